"""Where pictures come from: metadata files, archives, own classes, folders with partners; what is told of bad ones."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.conftest import picture, write
from sfumato.data.find.image_table import Picture, Pictures, Texts
from sfumato.data.find.metadata_source import entries_of
from sfumato.data.find.tar_source import expanded
from sfumato.data.order import Order
from sfumato.errors import UserError

RESOLUTION = ("--resolution", 64)


def items(plan):
    return [item for dataset in plan.datasets for subset in dataset.subsets for item in subset.items]


def captions(plan) -> dict[str, str]:
    return {Path(item.picture.path).name: item.picture.caption for item in items(plan)}


def metadata(path: Path, entries: dict[str, dict]) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"image_path": name, **fields}) for name, fields in entries.items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


# ---------------------------------------------------------------- metadata files


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_metadata_file_names_images_and_captions(find, pictures, tmp_path, ending):
    pictures(tmp_path / "a", 4)
    write(tmp_path / "a" / "deep" / "x.png", caption=None)
    pictures(tmp_path / "elsewhere", 1, seed=3)
    entries = {
        "img0.png": {"caption": "a cat", "tags": "red, blue", "image_size": [1, 1], "train_resolution": [64, 64]},
        "img1": {"tags": "only tags"},  # as the field's merging tools write it
        str(tmp_path / "a" / "img2.png"): {"caption": "whole path"},
        "deep/x.png": {"caption": "below"},
        str(tmp_path / "elsewhere" / "img0"): {"caption": "größe 猫"},
    }
    file = metadata(tmp_path / f"meta{ending}", entries)
    plan = find("--in_json", file, "--train_data_dir", tmp_path / "a", *RESOLUTION, "--dataset_repeats", 3)
    assert [item.picture.caption for item in items(plan)] == [
        "a cat,red, blue", "only tags", "whole path", "below", "größe 猫",
    ]  # fmt: skip
    assert [Path(item.picture.path) for item in items(plan)] == [
        tmp_path / name for name in ("a/img0.png", "a/img1.png", "a/img2.png", "a/deep/x.png", "elsewhere/img0.png")
    ]
    assert {item.size for item in items(plan)} == {(64, 64)}  # from the files, whatever the metadata says
    assert plan.num_train_images == 15


def test_paths_may_lead_out_of_the_folder(find, pictures, tmp_path):
    pictures(tmp_path / "a", 1)
    pictures(tmp_path / "b", 1)
    entries = {"../b/img0.png": {"caption": "out"}, "./img0.png": {"caption": "in"}}
    plan = find("--in_json", metadata(tmp_path / "m.json", entries), "--train_data_dir", tmp_path / "a", *RESOLUTION)
    assert [Path(item.picture.path).parent.name for item in items(plan)] == ["b", "a"]


def test_a_cache_beside_archives_is_refused(find, tmp_path):
    shards(tmp_path / "set")
    with pytest.raises(UserError, match="nothing is ever written"):
        toml(find, SHARDS, "--cache_dir", tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["000.tar", "001.tar", "002.tar"]


def test_without_a_folder_paths_are_whole_or_from_here(find, pictures, tmp_path, monkeypatch):
    pictures(tmp_path / "a", 2)
    file = metadata(
        tmp_path / "m.json", {"a/img0.png": {"caption": "x"}, str(tmp_path / "a/img1.png"): {"caption": "y"}}
    )
    monkeypatch.chdir(tmp_path)
    assert captions(find("--in_json", file, *RESOLUTION)) == {"img0.png": "x", "img1.png": "y"}


@pytest.mark.parametrize(
    ("fields", "one", "several"),
    [
        ({"caption": "first\nsecond", "tags": "a, b"}, "first", "first,a, b\nsecond,a, b"),
        ({"caption": " \n one \n\n two", "tags": ""}, "", "one\ntwo"),
        ({"tags": "a\nb"}, "a", "a,b"),
        ({"caption": "c", "tags": "a\nb"}, "c,a", "c,a,b"),
        ({"caption": "c", "tags": ["a", "b"]}, "c,a, b", "c,a, b"),
    ],
)
def test_captions_of_several_lines_and_tags(find, pictures, tmp_path, fields, one, several):
    pictures(tmp_path / "a", 1)
    arguments = ("--in_json", metadata(tmp_path / "m.json", {"img0.png": fields}), "--train_data_dir", tmp_path / "a")
    plain = find(*arguments, *RESOLUTION, "--on_missing_caption", "empty")
    assert captions(plain)["img0.png"] == one
    assert captions(find(*arguments, *RESOLUTION, "--enable_wildcard"))["img0.png"] == several


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "does not hold a JSON object"),
        ("{}", "names no images"),
        ('{"a": {"caption": "x"}\n"b": {}}', "line 2, is not valid JSON: a comma"),
        ('{"a": {"caption": "x"},\n\n "b": {"caption": }}', "line 3, is not valid JSON"),
        ('{"a": 3}', "a is 3, not an object"),
        ('{"img0.png": {"caption": 3}}', "img0.png: caption is 3, not a text"),
        ('{"img0.png": {"caption": "größe"}}'.encode("cp1252"), "line 1, is not UTF-8"),
        ('{"gone.png": {"caption": "x"}, "img0.png": {"caption": "y"}}', "1 of 2 images that"),
        ('{"img0.png": {}, "img1.png": {"caption": "y"}}', "1 of 2 images have no caption in"),
    ],
)
def test_faults_of_a_metadata_file(find, pictures, tmp_path, text, words):
    pictures(tmp_path / "a", 2)
    file = tmp_path / "m.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    find.attempt("--in_json", file, "--train_data_dir", tmp_path / "a", *RESOLUTION)
    assert any(words in line and "m.json" in line for line in find.said), find.said


@pytest.mark.parametrize(
    ("line", "words"), [("{", "line 2, is not valid JSON"), ('{"caption": "x"}', "line 2, has no image_path")]
)
def test_faults_of_json_lines_name_the_line(find, pictures, tmp_path, line, words):
    pictures(tmp_path / "a", 1)
    file = tmp_path / "m.jsonl"
    file.write_text('{"image_path": "img0.png", "caption": "x"}\n' + line + "\n")
    find.attempt("--in_json", file, "--train_data_dir", tmp_path / "a", *RESOLUTION)
    assert any(words in each for each in find.said)


WORDS = st.text(max_size=5)
VALUES = st.none() | st.booleans() | st.integers() | WORDS | st.dictionaries(WORDS, WORDS, max_size=2)


@given(st.dictionaries(WORDS, st.dictionaries(WORDS, VALUES, max_size=3)), st.sampled_from([None, 1, "\t"]))
def test_a_large_object_is_read_member_by_member_as_json_reads_it(tmp_path_factory, content, indent):
    file = tmp_path_factory.mktemp("json") / "m.json"
    file.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    assert {key: fields for _, key, fields in entries_of(file)} == content


def test_metadata_and_folders_in_datasets_of_their_own(find, pictures, tmp_path):
    pictures(tmp_path / "a", 2)
    metadata(tmp_path / "m.json", {"img0.png": {"caption": "x"}})
    subsets = "[[datasets.subsets]]\nmetadata_file = '{root}/m.json'\nimage_dir = '{root}/a'\n"
    text = f"[general]\nresolution = 64\n[[datasets]]\n{subsets}"
    text += "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{root}/a'\n"
    first, second = find.toml(text).datasets
    assert (len(first.subsets[0].items), len(second.subsets[0].items)) == (1, 2)
    with pytest.raises(UserError, match="mixes subsets"):
        find.toml(text.replace("[[datasets]]\n[[datasets.subsets]]\nimage_dir", "[[datasets.subsets]]\nimage_dir"))
    twice = find.toml(f"[[datasets]]\nresolution = 64\n{subsets}{subsets}")
    assert len(twice.datasets[0].subsets) == 1
    assert any("m.json a second time" in note for note in twice.notes)


def test_cache_info_takes_what_other_programs_remembered(find, pictures, tmp_path):
    pictures(tmp_path / "t" / "1_a", 2)
    argv = ("--train_data_dir", tmp_path / "t", *RESOLUTION, "--cache_info")
    plan = find(*argv)
    assert any("cache_info has no effect" in note for note in plan.notes)
    known = {"old/place/img1.png": {"caption": "remembered", "resolution": [64, 64]}}
    metadata(tmp_path / "t" / "1_a" / "metadata_cache.json", known)
    assert captions(find(*argv)) == {"img1.png": "remembered"}


# ---------------------------------------------------------------- JSON captions


def test_json_captions_beside_images(find, pictures, tmp_path):
    for i, content in enumerate(
        [{"caption": "a cat", "tags": ["x", "y"]}, "plain text", {"tags": "one, two", "id": 7}]
    ):
        path = write(tmp_path / "a" / f"{i}.png")
        path.with_suffix(".json").write_text(json.dumps(content))
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\n"
    plan = find.toml(text)
    assert captions(plan) == {"0.png": "a cat,x, y", "1.png": "plain text", "2.png": "one, two"}
    assert any("took the 3 .json files" in note for note in plan.notes)
    (tmp_path / "a" / "1.json").write_text("[1]")
    with pytest.raises(UserError, match=r"1\.json holds no caption"):
        find.toml(text)
    assert len(find.said) == 1


# ---------------------------------------------------------------- a class of the user's own


PLUGIN = """
class Cats:
    def __init__(self, resolution, seed=0):
        self.resolution = resolution
    def __iter__(self):
        for i in range(3):
            yield {"image": f"a/img{i}.png", "caption": f"cat {i} at {self.resolution}"}

class Old:
    def __init__(self, tokenizer): ...
    def __iter__(self): return iter(())

class Odd:
    def __iter__(self): yield {"picture": "x"}

def no_class(): ...
"""


def test_a_class_of_ones_own_yields_the_images(find, pictures, tmp_path, monkeypatch):
    pictures(tmp_path / "a", 3)
    (tmp_path / "my_cats.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    plan = find("--dataset_class", "my_cats.Cats", *RESOLUTION, "--dataset_repeats", 2)
    assert captions(plan)["img2.png"] == "cat 2 at (64, 64)"
    assert plan.num_train_images == 6
    for name, words in {
        "Old": "asks for tokenizer",
        "Odd": "sample 0 is {'picture': 'x'}",
        "no_class": "is no class that yields samples",
        "None": "is not found",
    }.items():
        find.attempt("--dataset_class", f"my_cats.{name}", *RESOLUTION)
        assert any(words in line for line in find.said), find.said


# ---------------------------------------------------------------- archives


def shard(path: Path, samples: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def png(seed: int, size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    picture(size, seed).save(buffer, "PNG")
    return buffer.getvalue()


def shards(root: Path, *, count: int = 3, each: int = 4) -> None:
    for s in range(count):
        samples: dict[str, bytes | str] = {}
        for i in range(each):
            key = f"{'very/long/' * 12}{s}{i:03}"  # longer than the old tar header can say
            samples[f"{key}.txt"] = f"caption {s} {i}"
            samples[f"{key}.json"] = json.dumps({"caption": "not this one"})
            samples[f"{key}.png"] = png(s * 100 + i, (64, 64) if i % 2 else (128, 64))
        shard(root / f"{s:03}.tar", samples)


SHARDS = (
    "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 16\nbatch_size = 2\n[[datasets.subsets]]\n"
)
SHARDS += "image_dir = '{root}/set/{000..002}.tar'\nnum_repeats = 2\n"


def toml(find, text: str, *argv, **options):
    return find.toml(text.replace("{root}", find.root.as_posix()), *argv, **{"bucket_step": 16, **options})


def test_archives_are_read_where_they_lie(find, tmp_path):
    shards(tmp_path / "set")
    plan = toml(find, SHARDS)
    assert [item.picture.caption for item in items(plan)] == [f"caption {s} {i}" for s in range(3) for i in range(4)]
    assert any("12 captions are from .txt files, for want of .caption files" in note for note in plan.notes)
    for place, item in enumerate(items(plan)):
        assert item.picture.read() == png(place // 4 * 100 + place % 4, item.size)
    assert toml(find, SHARDS).datasets == plan.datasets  # from what was remembered
    shard(tmp_path / "set" / "001.tar", {"x.png": png(9), "x.caption": "new"})
    assert [item.picture.caption for item in items(toml(find, SHARDS))][4] == "new"
    assert len(items(toml(find, SHARDS))) == 9


@pytest.mark.parametrize("processes", [1, 2])
def test_archives_give_disjoint_samples_and_whole_buckets(find, tmp_path, processes):
    shards(tmp_path / "set")
    plan = toml(find, SHARDS, processes=processes)
    seen: Counter[str] = Counter()
    for rank in range(processes):
        order = Order(plan, seed=1, rank=rank)
        for step in islice(order.steps(), order.steps_per_epoch):
            for batch in step.batches:
                assert {sample.item.choice.bucket for sample in batch.samples} == {batch.bucket}
                seen.update(sample.item.picture.path for sample in batch.samples if sample.real)
    assert seen == Counter({item.picture.path: 2 for item in items(plan)})


def test_faults_of_archives(find, tmp_path):
    shards(tmp_path / "set", count=2)
    shard(
        tmp_path / "set" / "001.tar",
        {"a.png": png(0), "a.txt": "x", "bad.png": b"no", "bad.txt": "x", "alone.png": png(1)},
    )
    (tmp_path / "set" / "002.tar").write_bytes(b"this is no archive" * 100)
    with pytest.raises(UserError):
        toml(find, SHARDS)
    said = "\n".join(find.said)
    assert "002.tar is no tar archive" in said
    assert "001.tar/bad.png is no image" in said
    assert "1 of 6 images have no caption" in said
    assert "alone.png" in said
    with pytest.raises(UserError, match=r"8 of 10 archives are not there"):
        toml(find, SHARDS.replace("{000..002}", "{001..010}"))
    (tmp_path / "set" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="is compressed"):
        toml(find, SHARDS.replace("{000..002}.tar", "a.tar.gz"))


def test_an_archive_that_is_cut_or_damaged_anywhere_is_told(find, tmp_path):
    """Wherever it ends and whichever header is damaged: refused, or, where a whole file ends there, told of."""
    path = shard(
        tmp_path / "set" / "000.tar",
        {f"{i}.{kind}": png(i) if kind == "png" else "x" for i in range(2) for kind in ("png", "txt")},
    )
    text = SHARDS.replace("{000..002}", "000")
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    ends = [member.offset for member in members[1:]] + [members[-1].offset_data + 512]
    for cut in [*range(100, ends[-1] + 1, 200), *ends]:
        path.write_bytes(whole[:cut])
        if cut not in ends:
            with pytest.raises(UserError, match=r"000\.tar is no tar archive, or is damaged"):
                toml(find, text)
            continue
        plan = toml(find, text, "--on_missing_caption", "empty")
        assert len(items(plan)) == (1 if cut < ends[1] + 512 else 2)
        assert any("000.tar ends without the mark" in note for note in plan.notes)
    for member in members:
        damaged = bytearray(whole)
        damaged[member.offset + 100] ^= 64
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"000\.tar is no tar archive, or is damaged"):
            toml(find, text)
    path.write_bytes(whole)
    assert not any("ends without" in note for note in toml(find, text).notes)


def test_hidden_files_in_an_archive_are_passed_over(find, tmp_path):
    """As some systems put them beside every file."""
    shard(tmp_path / "set" / "000.tar", {"a/x.png": png(0), "a/x.txt": "cat", "a/._x.png": "no image", "a/._x.txt": ""})
    assert captions(toml(find, SHARDS.replace("{000..002}", "000"))) == {"x.png": "cat"}


def test_an_archive_that_shrinks_under_the_run_is_named(find, tmp_path):
    shards(tmp_path / "set")
    plan = toml(find, SHARDS)
    with (tmp_path / "set" / "002.tar").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match=r"002\.tar.* is cut short"):
        items(plan)[-1].picture.read()
    assert not items(plan)[-1].picture.is_unchanged()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{b,a}{1..2}", ["b1", "b2", "a1", "a2"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a}..{b", ["a..{b"]),
    ],
)
def test_braces_are_written_out(pattern, names):
    assert expanded(pattern) == names


# ---------------------------------------------------------------- bad input


def bad_files(folder: Path) -> dict[str, str]:
    """Files that cannot be trained on, and what is said of each."""
    write(folder / "good.png", caption=None)
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "PNG")
    photo = io.BytesIO()
    picture((300, 200)).save(photo, "JPEG")
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    large = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + bytes(8) + b"IEND" + bytes(4)
    contents = {
        "zero.png": (b"", "is empty (0 bytes)"),
        "one.png": (small.getvalue(), "is only 1x1 pixels"),
        "page.jpg": (b"<html>not found</html>", "is no image"),
        "short.jpg": (photo.getvalue()[:-2000], "short.jpg is damaged or cut short"),
        "short.png": ((folder / "good.png").read_bytes()[:-3000], "short.png is damaged or cut short"),
        "huge.png": (large, "claims 30000x30000 pixels"),
        "new.jxl": (bytes.fromhex("ff0a05c800138802"), "is a JPEG XL image, which needs a plug-in"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    return {name: words for name, (_, words) in contents.items()}


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_every_kind_of_bad_image_is_named(find, tmp_path, policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)  # as where it is not installed
    expected = bad_files(tmp_path / "a")
    write(tmp_path / "a" / "wrongly_named.png", caption=None).rename(tmp_path / "a" / "wrongly_named.jpg")
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\nclass_tokens = 'x'\n"
    if policy == "skip":
        plan = find.toml(text, "--on_bad_image", "skip")
        assert sorted(captions(plan)) == ["good.png", "wrongly_named.jpg"]
        assert any("7 bad images are left out" in note for note in plan.notes)
        return
    for name, words in expected.items():
        others = [tmp_path / "a" / other for other in expected if other != name]
        (tmp_path / "aside").mkdir(exist_ok=True)
        for other in others:
            other.rename(tmp_path / "aside" / other.name)
        with pytest.raises(UserError) as caught:
            find.toml(text)
        assert words in str(caught.value)
        assert name in str(caught.value)
        for other in others:
            (tmp_path / "aside" / other.name).rename(other)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_files_that_cannot_be_opened_are_named(find, tmp_path, policy):
    """Links to nowhere, as an image and as a caption: like files that may not be read, which root always may."""
    write(tmp_path / "a" / "good.png", caption="cat")
    write(tmp_path / "a" / "other.png", caption="dog")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\ncaption_extension = 'txt'\n"
    if policy == "skip":
        assert sorted(captions(find.toml(text, "--on_bad_image", "skip"))) == ["good.png", "other.png"]
        return
    (tmp_path / "a" / "other.txt").unlink()
    (tmp_path / "a" / "other.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError):
        find.toml(text)
    for line, name in zip(find.said, ("gone.png", "other.txt"), strict=True):
        assert f"{name} cannot be read (No such file or directory) — check that it is there and may be read" in line


def test_more_at_the_end_of_a_photo_is_no_fault(find, tmp_path):
    path = tmp_path / "a" / "x.jpg"
    path.parent.mkdir()
    picture((80, 64)).save(path, "JPEG")
    path.write_bytes(path.read_bytes() + b"what some cameras write there" * 10)
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\nclass_tokens = 'x'\n"
    assert items(find.toml(text))[0].size == (80, 64)


def test_a_subset_that_is_empty_is_told_beside_the_faults_of_others(find, pictures, tmp_path):
    """An unknown key, a missing folder, an empty one and a bad image, each in a subset of its own: all at once."""
    (tmp_path / "empty").mkdir()
    write(tmp_path / "bad" / "x.png", caption="x").write_bytes(b"")
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{{root}}/{name}'\n" for name in ("gone", "empty", "bad"))
    text = f"[[datasets]]\nresolution = 64\n{subsets}[[datasets.subsets]]\nimage_dir = 'x'\nkeep_token = 1\n"
    with pytest.raises(UserError):
        find.toml(text)
    said = "\n".join(find.said)
    for words in (
        "unknown key datasets[0].subsets[3].keep_token",
        "gone cannot be read",
        "no images in",
        "is empty (0",
    ):
        assert words in said, (words, said)


# ---------------------------------------------------------------- columns


SIDES = st.integers(8, 10**6)
PICTURES = st.lists(
    st.tuples(st.text(min_size=1), st.integers(0, 2**40), st.integers(0, 2**62), SIDES, SIDES, st.text()).map(
        lambda row: Picture(*row)
    )
)


@given(PICTURES, st.data())
def test_columns_hold_what_they_were_made_of(rows, data):
    columns = Pictures.of(rows)
    assert list(columns) == rows
    assert columns == Pictures.of(rows)
    taken = data.draw(st.lists(st.sampled_from(range(len(rows))))) if rows else []
    assert list(columns.take(np.array(taken, np.int64))) == [rows[i] for i in taken]
    sizes, which = columns.sizes()
    assert [sizes[i] for i in which] == [(row.width, row.height) for row in rows]


@given(st.lists(st.text(st.characters(exclude_categories=[]))))
def test_texts_of_every_kind_come_back(texts):
    """Lone surrogates, too, as odd file names have them."""
    assert list(Texts.of(texts)) == texts
    assert [Texts.of(texts)[i] for i in range(len(texts))] == texts


def test_odd_file_names(find, tmp_path):
    try:
        folder = os.fsencode(tmp_path / "t" / "1_a")
        (tmp_path / "t" / "1_a").mkdir(parents=True)
        shutil.copy(write(tmp_path / "x.png"), folder + b"/\xff\xfe {b}.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    for _ in range(2):
        (item,) = items(find("--train_data_dir", tmp_path / "t", *RESOLUTION))
        assert item.picture.read() == (tmp_path / "x.png").read_bytes()
