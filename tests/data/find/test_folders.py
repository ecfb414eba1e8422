"""Image folders: bad files, odd names, and the dataset index that saves reading them again."""

from __future__ import annotations

import io
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
from PIL import Image

from data.conftest import make_image, write_image, write_images
from data.dataset_files import (
    RESOLUTION,
    list_captions,
    list_items,
)
from sfumato.data.find import folders
from sfumato.errors import UserError


def write_bad_files(folder: Path) -> dict[str, str]:
    """Files that cannot be trained on -> the code of the error."""
    write_image(folder / "good.png", caption=None)
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "PNG")
    photo = io.BytesIO()
    make_image((300, 200)).save(photo, "JPEG")
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    large = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + bytes(8) + b"IEND" + bytes(4)
    contents = {
        "zero.png": (b"", "image-file-empty"),
        "one.png": (small.getvalue(), "image-too-small"),
        "page.jpg": (b"<html>not found</html>", "image-header-damaged"),
        "short.jpg": (photo.getvalue()[:-2000], "image-file-cut-short"),
        "short.png": ((folder / "good.png").read_bytes()[:-3000], "image-file-cut-short"),
        "huge.png": (large, "image-too-large"),
        "new.jxl": (bytes.fromhex("ff0a05c800138802"), "jxl-plugin-missing"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    return {name: code for name, (_, code) in contents.items()}


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_every_kind_of_bad_image_is_named(find, tmp_path, policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)  # as if it were not installed
    expected = write_bad_files(tmp_path / "a")
    write_image(tmp_path / "a" / "wrongly_named.png", caption=None).rename(tmp_path / "a" / "wrongly_named.jpg")
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\nclass_tokens = 'x'\n"
    if policy == "skip":
        plan = find.toml(text, "--on_bad_image", "skip")
        assert sorted(list_captions(plan)) == ["good.png", "wrongly_named.jpg"]
        assert any("7 bad images are skipped" in note for note in plan.notes)
        return
    for name, code in expected.items():
        others = [tmp_path / "a" / other for other in expected if other != name]
        (tmp_path / "aside").mkdir(exist_ok=True)
        for other in others:
            other.rename(tmp_path / "aside" / other.name)
        with pytest.raises(UserError, match=name) as error:
            find.toml(text)
        assert error.value.code == code
        for other in others:
            (tmp_path / "aside" / other.name).rename(other)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_files_that_cannot_be_opened_are_named(find, tmp_path, policy):
    """Broken links, for an image and a caption; root may read any file, so permissions cannot be tested."""
    write_image(tmp_path / "a" / "good.png", caption="cat")
    write_image(tmp_path / "a" / "other.png", caption="dog")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\ncaption_extension = 'txt'\n"
    if policy == "skip":
        assert sorted(list_captions(find.toml(text, "--on_bad_image", "skip"))) == ["good.png", "other.png"]
        return
    (tmp_path / "a" / "other.txt").unlink()
    (tmp_path / "a" / "other.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError):
        find.toml(text)
    assert find.codes == ["data-file-unreadable"] * 2
    for line, name in zip(find.messages, ("gone.png", "other.txt"), strict=True):
        assert f"{name} cannot be read (No such file or directory)" in line


def test_data_after_the_end_of_a_photo_is_no_fault(find, tmp_path):
    path = tmp_path / "a" / "x.jpg"
    path.parent.mkdir()
    make_image((80, 64)).save(path, "JPEG")
    path.write_bytes(path.read_bytes() + b"what some cameras write there" * 10)
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/a'\nclass_tokens = 'x'\n"
    assert list_items(find.toml(text))[0].size == (80, 64)


def test_odd_file_names(find, tmp_path):
    try:
        folder = os.fsencode(tmp_path / "t" / "1_a")
        (tmp_path / "t" / "1_a").mkdir(parents=True)
        shutil.copy(write_image(tmp_path / "x.png"), folder + b"/\xff\xfe {b}.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    for _ in range(2):
        (item,) = list_items(find("--train_data_dir", tmp_path / "t", *RESOLUTION))
        assert item.image.read() == (tmp_path / "x.png").read_bytes()


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_bad_images_are_named(find, tmp_path, policy):
    write_images(tmp_path / "t" / "1_a", 1)
    (tmp_path / "t" / "1_a" / "img0.png").rename(tmp_path / "t" / "1_a" / "good.png")
    (tmp_path / "t" / "1_a" / "img0.txt").rename(tmp_path / "t" / "1_a" / "good.txt")
    for i in range(22):
        (tmp_path / "t" / "1_a" / f"img{i}.png").write_bytes(b"nonsense" if i else b"")
    plan = find.attempt("--train_data_dir", tmp_path / "t", *RESOLUTION, "--on_bad_image", policy)
    if policy == "error":
        assert find.codes == ["image-file-empty", *["image-header-damaged"] * 19, "more-bad-images"]
        assert "img0.png" in find.messages[0]
        assert "2 more bad images" in find.messages[-1]
        assert "sfumato dataset inspect" in find.messages[-1]
    else:
        assert not find.messages
        assert len(list_items(plan)) == 1
        assert any("22 bad images are skipped" in note and "img0.png" in note for note in plan.notes)
        assert any("17 more: `sfumato dataset inspect`" in note for note in plan.notes)


def test_the_index_is_used_only_for_unchanged_files(find, tmp_path, monkeypatch):
    first, second, third = write_images(tmp_path / "t" / "1_a", 3)
    arguments = ("--train_data_dir", tmp_path / "t", *RESOLUTION)
    cold = find(*arguments)
    read: list[str] = []
    original = folders.read_image_header

    def record(descriptor, path, size):
        read.append(Path(path).name)
        return original(descriptor, path, size)

    monkeypatch.setattr(folders, "read_image_header", record)
    assert find(*arguments).datasets[0].subsets[0].items == cold.datasets[0].subsets[0].items
    assert read == []
    shutil.copy(second, first)  # another size in bytes
    os.utime(third, ns=(1, 1))
    first.with_suffix(".txt").write_text("edited")
    warm = find(*arguments)
    assert sorted(read) == ["img0.png", "img2.png"]
    assert list_captions(warm)["img0.png"] == "edited"


@pytest.mark.parametrize("damage", [b"", b"{", b"PK\3\4", b"\xff\xfe", None])
def test_a_damaged_index_costs_only_time(find, tmp_path, damage):
    write_images(tmp_path / "t" / "1_a", 2)
    arguments = ("--train_data_dir", tmp_path / "t", *RESOLUTION)
    cold = find(*arguments)
    indexes = list((tmp_path / "cache" / "folders").iterdir())
    assert len(indexes) == 2  # sizes and captions
    for index in indexes:
        index.write_bytes(damage if damage is not None else index.read_bytes()[:-400])
    assert find(*arguments).datasets == cold.datasets
    assert all(len(index.read_bytes()) > 1000 for index in indexes)  # written again
