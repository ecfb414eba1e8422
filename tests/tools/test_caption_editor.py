"""The caption editor without its page: changes of texts and files, undone to the byte, and what is refused."""

from __future__ import annotations

import os
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sfumato.cli.main import main
from sfumato.tools.editor.text_changes import AddTag, RemoveTag, RenameTag, ReplaceText, TextChange, TidyTags
from sfumato.tools.editor.thumbnails import THUMBNAIL_SIDE, ThumbnailCache
from tools.editing import Editor, find_dataset

CAPTIONS = {
    "a.txt": b"red hair, cat\r\n",
    "b.txt": b"\xef\xbb\xbfa cat, smile",
    "c.txt": b"",
    "e.txt": "café".encode("latin-1"),
    "f.txt": b"one two three four five six seven, cat,, cat",
    "g.txt": b"A cat,  smile\nsecond line",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With Windows' line break, a byte order mark, an empty file, none (d), Latin-1, and two in a folder."""
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "b", "c", "d", "e", "inner/f", "inner/g"):
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
        file = Path(name).with_suffix(".txt")
        if file.name in CAPTIONS:
            (folder / file).write_bytes(CAPTIONS[file.name])
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix not in (".png", "")}


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (ReplaceText(action="replace", find="Cat", replacement="dog"), "cat, a CAT, scatter", "dog, a dog, sdogter"),
        (ReplaceText(action="replace", find="Cat", replacement="dog", match_case=True), "cat, Cat", "cat, dog"),
        (ReplaceText(action="replace", find="cat", replacement=r"\1", whole_words=True), "cat, scat", r"\1, scat"),
        (ReplaceText(action="replace", find="a.b", replacement=""), "a.b axb", "axb"),
        (AddTag(action="add", tag=" new "), "one,two", "one, two, new"),
        (AddTag(action="add", tag="TWO"), "one,two", "one,two"),
        (AddTag(action="add", tag="two", at_start=True), "one,two", "two, one"),
        (AddTag(action="add", tag="two", at_start=True), "two,one", "two,one"),
        (AddTag(action="add", tag="new"), "", "new"),
        (RemoveTag(action="remove", tag="cat"), "a cat, cat, CAT,dog", "a cat, dog"),
        (RemoveTag(action="remove", tag="cat"), "a,b", "a,b"),
        (RenameTag(action="rename", tag="cat", name="dog"), "a, cat, b", "a, dog, b"),
        (RenameTag(action="rename", tag="cat", name="dog"), "dog, cat, b", "dog, b"),
        (RenameTag(action="rename", tag="cat", name="x, y"), "a, cat", "a, x, y"),
        (TidyTags(action="tidy"), " a ,, b,A,  c d \n\n e ,", "a, b, c d\ne"),
        (TidyTags(action="tidy"), "A cat on a chair. It sleeps.", "A cat on a chair. It sleeps."),
    ],
)
def test_a_change_of_a_text(change: TextChange, before: str, after: str) -> None:
    assert change.apply(before, ",").strip() == after


def test_every_line_and_other_separators() -> None:
    assert AddTag(action="add", tag="x").apply("a\nb", ",") == "a, x\nb, x"
    assert RemoveTag(action="remove", tag="b").apply("a; b; c", ";") == "a; c"


def test_what_is_shown_is_on_disk_and_undone_to_the_byte(folder: Path) -> None:
    before = read_files(folder)
    editor = Editor(folder)
    assert editor.edit("d.txt", "first line\n ")["changed"]
    assert (folder / "d.txt").read_bytes() == b"first line\n"
    outcome = editor.change(AddTag(action="add", tag="sks", at_start=True))
    assert set(outcome["changed"]) == {number for name, number in editor.numbers.items() if name != "e.txt"}
    after = read_files(folder)
    assert after["a.txt"] == b"sks, red hair, cat\n"
    assert after["b.txt"] == b"sks, a cat, smile\n"
    assert after["c.txt"] == b"sks\n"
    assert after["e.txt"] == before["e.txt"]
    assert after["g.txt"] == b"sks, A cat, smile\nsks, second line\n"
    assert {name: data.decode().strip() for name, data in after.items() if name != "e.txt"} == {
        name: editor.text(name) for name in editor.numbers if name != "e.txt"
    }
    assert editor.edit("a.txt", "")["changed"]
    assert (folder / "a.txt").read_bytes() == b""
    session = editor.session
    assert [step["count"] for step in session.list_changes(0)["done"]] == [1, 6, 1]
    session.undo(3)
    assert read_files(folder) == before  # d.txt, which the editor made, is gone
    session.redo(2)
    assert read_files(folder) == after
    assert editor.edit("b.txt", "other")["changed"]
    assert not session.list_changes(0)["undone"]


def test_nothing_is_written_where_nothing_changes(folder: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    editor = Editor(folder)
    assert not editor.edit("a.txt", "  red hair, cat")["changed"]
    assert not editor.edit("d.txt", " ")["changed"]
    assert not editor.change(RemoveTag(action="remove", tag="absent"))["changed"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    assert not editor.session.list_changes(0)["done"]


def test_what_others_wrote_is_kept(folder: Path) -> None:
    editor = Editor(folder)
    (folder / "a.txt").write_text("theirs")
    assert editor.edit("a.txt", "mine") == {"changed": [], "conflicts": [editor.numbers["a.txt"]], "failures": []}
    assert (folder / "a.txt").read_text() == "theirs" == editor.text("a.txt")
    assert editor.edit("a.txt", "mine", base="red hair, cat")["conflicts"]  # a page that is behind
    assert editor.edit("a.txt", "mine", base="theirs")["changed"]
    (folder / "b.txt").unlink()
    (folder / "d.txt").write_text("new")
    outcome = editor.change(AddTag(action="add", tag="x"))
    assert {"b.txt", "d.txt"} == {name for name in editor.numbers if editor.numbers[name] in outcome["conflicts"]}
    assert (folder / "d.txt").read_text() == "new"
    assert not (folder / "b.txt").exists()
    (folder / "c.txt").write_text("theirs again")
    assert editor.session.undo()["conflicts"] == [editor.numbers["c.txt"]]
    assert (folder / "a.txt").read_text() == "mine\n"
    assert (folder / "c.txt").read_text() == "theirs again"


def test_a_page_learns_what_changed_since(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.tools.editor.session.LOOK_SECONDS", -1)
    editor = Editor(folder)
    seen = editor.session.list_changes(0)["revision"]
    assert not editor.session.list_changes(seen)["files"]
    (folder / "a.txt").write_text("a cat, smile")
    changes = editor.session.list_changes(seen)
    shown = {file["name"]: file for file in changes["files"]}
    assert shown["a.txt"]["text"] == "a cat, smile"
    assert set(shown) == {"a.txt", "b.txt"}  # which is now the same as another
    assert shown["b.txt"]["faults"] == ["duplicate"]
    assert not editor.session.list_changes(changes["revision"])["files"]


def test_faults(folder: Path) -> None:
    editor = Editor(folder)
    assert editor.faults("a.txt") == set()
    assert editor.faults("c.txt") == {"empty"}
    assert editor.faults("d.txt") == {"missing"}
    assert editor.faults("e.txt") == {"unread"}
    assert editor.faults("f.txt") >= {"repeated", "untidy"}
    assert editor.faults("g.txt") == {"lines", "untidy"}
    assert Editor(folder, "--enable_wildcard").faults("g.txt") == {"untidy"}
    assert editor.edit("a.txt", "1girl, long_hair, Short Hair")["changed"]
    assert editor.faults("a.txt") == {"contradictory"}
    assert editor.text("e.txt") == "café"  # as it is probably meant, and in UTF-8 once it is saved
    assert editor.edit("e.txt", "café!")["changed"]
    assert (folder / "e.txt").read_bytes() == "café!\n".encode()


def test_links_and_permissions_stay(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.txt"
    target.write_text("linked")
    target.chmod(0o640)
    (folder / "d.txt").symlink_to(target)
    editor = Editor(folder)
    assert editor.edit("d.txt", "changed")["changed"]
    assert (folder / "d.txt").is_symlink()
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("changed\n", 0o640)


def test_a_failure_is_reported_and_the_rest_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Editor(folder)
    replace = Path.replace

    def fail_for_a(path: Path, target: Path) -> Path:
        if target.name == "a.txt":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_for_a)
    outcome = editor.change(AddTag(action="add", tag="x"))
    assert [failure["file"] for failure in outcome["failures"]] == [editor.numbers["a.txt"]]
    assert "No space left" in outcome["failures"][0]["message"]
    assert read_files(folder)["a.txt"] == CAPTIONS["a.txt"]
    assert len(outcome["changed"]) == 5
    assert not list(folder.rglob("*.tmp"))
    editor.session.undo()
    assert read_files(folder) == CAPTIONS


def test_a_caption_file_of_several_images_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("me_10_20_30_40.png", "me_1_2_3_4.png", "me.jpg", "you.webp", "YOU2.png"):
        Image.new("RGB", (32, 32)).save(folder / name)
    (folder / "me.txt").write_text("me")
    (folder / "you2.TXT").write_text("you")
    dataset = find_dataset(folder)
    captions = {image.name: image.caption.name for image in dataset.images}
    assert captions["me_10_20_30_40.png"] == captions["me_1_2_3_4.png"] == captions["me.jpg"] == "me.txt"
    assert captions["YOU2.png"] == "you2.TXT"
    assert captions["you.webp"] == "you.txt"
    assert {image.caption.name for image in find_dataset(folder, "--caption_extension", "cap").images} >= {"me.cap"}


def test_a_dataset_file(folder: Path, tmp_path: Path) -> None:
    toml = tmp_path / "set.toml"
    toml.write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder}"\ncaption_extension = ".txt"\n'
        f'[[datasets.subsets]]\nimage_dir = "{folder / "inner"}"\ncaption_extension = ".cap"\nenable_wildcard = true\n'
    )
    dataset = find_dataset(toml)
    assert [image.name for image in dataset.images][-2:] == ["inner/f.png", "inner/g.png"]
    assert dataset.images[-1].caption.name == "g.cap"
    assert [image.rules.enable_wildcard for image in dataset.images] == [False] * 5 + [True] * 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["nothing"], "path-missing"),
        (["empty"], "editor-no-images"),
        (["images", "--caption_extension", "json"], "editor-json-captions"),
        (["--in_json", "meta.json", "--train_data_dir", "images"], "editor-captions-not-beside"),
        (["images", "--port", "70000"], "option-out-of-range"),
        ([], "data-missing"),
    ],
)
def test_what_is_no_dataset(
    words: list[str], code: str, folder: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("empty").mkdir()
    Path("meta.json").write_text("{}")
    assert main(["dataset", "edit", *words, "--cache_dir", "cache"]) == 2
    assert codes == [code]


def test_thumbnails_show_the_image_and_find_damage(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((100, 100, 1))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels).save(folder / "a.jpg", exif=exif, quality=95)
    data = (folder / "a.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(data[: len(data) // 2])
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "a.png")
    images = find_dataset(folder).images
    numbers = {image.name: number for number, image in enumerate(images)}
    faults: dict[int, str] = {}
    thumbnails = ThumbnailCache(images, tmp_path / "thumbnails", faults.__setitem__)
    thumbnails.start(workers=2)
    thumbnails.stop()
    for number in range(len(images)):
        if number != numbers["b.jpg"]:
            thumbnails.get(number, THUMBNAIL_SIDE)
    assert set(faults) | {number for number, image in enumerate(images) if image.fault} == {numbers["b.jpg"]}
    made = list((tmp_path / "thumbnails").iterdir())
    assert len(made) == len(images) - 1

    shown = read_webp(thumbnails.get(numbers["a.jpg"], THUMBNAIL_SIDE))
    expected = ImageOps.exif_transpose(Image.open(folder / "a.jpg")).resize((240, 320), Image.Resampling.BOX)
    assert shown.size == (240, 320)
    assert np.abs(np.asarray(shown, float) - np.asarray(expected, float)).mean() < 6
    assert read_webp(thumbnails.get(numbers["a.png"], THUMBNAIL_SIDE)).getchannel("A").getextrema() == (0, 0)
    os.utime(folder / "a.jpg", ns=(1, 1))
    (tmp_path / "thumbnails" / "foreign.txt").touch()
    again = ThumbnailCache(find_dataset(folder).images, tmp_path / "thumbnails", faults.__setitem__)
    again.start(workers=1)
    again.stop()
    again.get(numbers["a.jpg"], THUMBNAIL_SIDE)
    assert len(list((tmp_path / "thumbnails").glob("*.webp"))) == len(images) - 1  # the old one is gone


def read_webp(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data), formats=["WEBP"])


def test_tokens(folder: Path) -> None:
    editor = Editor(folder)
    session, counted = editor.session, threading.Event()

    def update() -> None:
        session.update_tokens()
        if session.tokens.is_loaded and not session.tokens.pending:
            counted.set()

    session.tokens.start(update)
    assert counted.wait(10)
    session.tokens.stop()
    counts = {file["name"]: file["tokens"] for file in session.list_changes(0)["files"]}
    assert counts["a.txt"] == {"words": 3}
    assert counts["f.txt"] == {"words": 9}
    assert counts["d.txt"] is None
    assert editor.faults("f.txt") == {"long", "repeated", "untidy"}
    answer = session.count_tokens(0, "one two three four five six, seven eight")
    assert answer == {"tokens": {"words": 8}, "cut": len("one two three four five six,")}
    assert session.count_tokens(0, "one two")["cut"] is None
