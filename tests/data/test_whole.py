"""--on_bad_image skip: pictures that are damaged in their midst are left out before training, from any source."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from data.conftest import picture, write
from sfumato.data.find import verify_images as whole
from sfumato.errors import UserError

SUBSET = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nclass_tokens = 'x'\nimage_dir = "
SKIP = ("--on_bad_image", "skip")


def damage(path: Path) -> Path:
    """A picture whose header and end are whole; pixels between them are not."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are decoded."""
    seen: list[str] = []
    real = whole.decode

    def decode(data: bytes, path: str):
        seen.append(Path(path).name)
        return real(data, path)

    monkeypatch.setattr(whole, "decode", decode)
    return seen


def found(plan) -> list[str]:
    return [Path(item.picture.path).name for _, _, item in plan.used()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        write(tmp_path / "a" / f"{i}.png", seed=i)
    picture((200, 100)).save(tmp_path / "a" / "photo.jpg", "JPEG")
    damage(tmp_path / "a" / "1.png")
    return tmp_path / "a"


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_what_cannot_be_decoded_is_left_out_and_named(find, folder, tmp_path, source, decoded):
    place = "'{root}/a'"
    if source == "archive":
        place = "'{root}/a.tar'"
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(folder, "deep")
    plan = find.toml(SUBSET + place, *SKIP)
    assert sorted(found(plan)) == ["0.png", "2.png", "3.png", "photo.jpg"]
    assert any("1 bad images are left out" in note and "1.png is damaged" in note for note in plan.notes)
    assert len(decoded) == 5
    assert found(find.toml(SUBSET + place, *SKIP)) == found(plan)
    assert decoded[5:] == ["1.png"]  # the others are known to be whole


def test_a_picture_that_changed_is_decoded_again(find, folder, decoded):
    find.toml(SUBSET + "'{root}/a'", *SKIP)
    decoded.clear()
    write(folder / "1.png", seed=9)  # mended
    damage(folder / "2.png")
    os.utime(folder / "2.png", ns=(1, 1))
    assert sorted(found(find.toml(SUBSET + "'{root}/a'", *SKIP))) == ["0.png", "1.png", "3.png", "photo.jpg"]
    assert sorted(decoded) == ["1.png", "2.png"]


def test_nothing_is_decoded_where_bad_pictures_are_a_fault(find, folder, decoded):
    assert len(found(find.toml(SUBSET + "'{root}/a'"))) == 5
    assert not decoded


def test_a_picture_whose_mask_is_damaged_is_left_out_with_it(find, folder, tmp_path):
    (folder / "photo.jpg").unlink()
    for i in range(4):
        write(tmp_path / "masks" / f"{i}.png", seed=10 + i)
    damage(tmp_path / "masks" / "3.png")
    text = SUBSET + "'{root}/a'\nconditioning_data_dir = '{root}/masks'\n"
    assert found(find.toml(text, "--masked_loss", *SKIP)) == ["0.png", "2.png"]
    (folder / "2.png").write_bytes(b"")
    assert found(find.toml(text, "--masked_loss", *SKIP)) == ["0.png"]  # no mask counts as one without a picture


def test_a_mask_of_a_picture_without_a_caption_is_none_too_many(find, folder, tmp_path):
    for name in ("1.png", "2.png", "photo.jpg"):
        (folder / name).unlink()
    for i in (0, 3):
        write(tmp_path / "masks" / f"{i}.png", seed=10 + i)
    (folder / "0.txt").write_text("cat")
    text = SUBSET.replace("class_tokens = 'x'", "caption_extension = 'txt'") + "'{root}/a'\n"
    text += "conditioning_data_dir = '{root}/masks'\n"
    assert found(find.toml(text, "--masked_loss", "--on_missing_caption", "skip")) == ["0.png"]


def test_nothing_left_is_a_fault(find, tmp_path):
    damage(write(tmp_path / "a" / "0.png"))
    with pytest.raises(UserError, match="every image is left out"):
        find.toml(SUBSET + "'{root}/a'", *SKIP)
