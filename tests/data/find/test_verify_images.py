"""--on_bad_image skip: images that are damaged in the middle are skipped before training, from any source."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from data.conftest import make_image, write_image
from sfumato.data.find import verify_images
from sfumato.errors import UserError

SUBSET = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nclass_tokens = 'x'\nimage_dir = "
SKIP = ("--on_bad_image", "skip")


def damage(path: Path) -> Path:
    """An image with a valid header and end, and damaged pixels between them."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are decoded."""
    seen: list[str] = []
    real = verify_images.decode_layers

    def decode(data: bytes, path: str, **options: bool):
        seen.append(Path(path).name)
        return real(data, path, **options)

    monkeypatch.setattr(verify_images, "decode_layers", decode)
    return seen


def list_names(plan) -> list[str]:
    return [Path(item.image.path).name for _, _, item in plan.iterate_used()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        write_image(tmp_path / "a" / f"{i}.png", seed=i)
    make_image((200, 100)).save(tmp_path / "a" / "photo.jpg", "JPEG")
    damage(tmp_path / "a" / "1.png")
    return tmp_path / "a"


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_what_cannot_be_decoded_is_skipped_and_named(find, folder, tmp_path, source, decoded):
    source_path = "'{root}/a'"
    if source == "archive":
        source_path = "'{root}/a.tar'"
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(folder, "deep")
    plan = find.toml(SUBSET + source_path, *SKIP)
    assert sorted(list_names(plan)) == ["0.png", "2.png", "3.png", "photo.jpg"]
    assert any("1 bad image is skipped" in note and "1.png is damaged" in note for note in plan.notes)
    assert len(decoded) == 5
    assert list_names(find.toml(SUBSET + source_path, *SKIP)) == list_names(plan)
    assert decoded[5:] == ["1.png"]  # the others are known to be undamaged


def test_an_image_that_changed_is_decoded_again(find, folder, decoded):
    find.toml(SUBSET + "'{root}/a'", *SKIP)
    decoded.clear()
    write_image(folder / "1.png", seed=9)  # repaired
    damage(folder / "2.png")
    os.utime(folder / "2.png", ns=(1, 1))
    assert sorted(list_names(find.toml(SUBSET + "'{root}/a'", *SKIP))) == ["0.png", "1.png", "3.png", "photo.jpg"]
    assert sorted(decoded) == ["1.png", "2.png"]


def test_only_the_first_is_decoded_where_bad_images_are_a_fault(find, folder, decoded):
    assert len(list_names(find.toml(SUBSET + "'{root}/a'"))) == 5
    assert decoded == ["0.png"]


def test_a_damaged_first_image_is_found_before_training(find, folder):
    damage(folder / "0.png")
    with pytest.raises(UserError) as error:
        find.toml(SUBSET + "'{root}/a'")
    assert error.value.code == "image-decode-failed"
    assert "0.png" in error.value.what


def test_of_many_folders_some_are_tried(find, tmp_path, decoded):
    for i in range(40):
        write_image(tmp_path / f"{i:02d}" / "0.png", seed=i)
    subsets = [f"[[datasets.subsets]]\nclass_tokens = 'x'\nimage_dir = '{{root}}/{i:02d}'" for i in range(40)]
    find.toml("\n".join(["[[datasets]]", "resolution = 64", *subsets]))
    assert 8 <= len(decoded) <= 16


def test_an_image_with_a_damaged_mask_is_skipped(find, folder, tmp_path):
    (folder / "photo.jpg").unlink()
    for i in range(4):
        write_image(tmp_path / "masks" / f"{i}.png", seed=10 + i)
    damage(tmp_path / "masks" / "3.png")
    text = SUBSET + "'{root}/a'\nconditioning_data_dir = '{root}/masks'\n"
    assert list_names(find.toml(text, "--masked_loss", *SKIP)) == ["0.png", "2.png"]
    (folder / "2.png").write_bytes(b"")
    assert list_names(find.toml(text, "--masked_loss", *SKIP)) == ["0.png"]  # the mask of a skipped image is no fault


def test_the_mask_of_an_image_without_a_caption_is_no_fault(find, folder, tmp_path):
    for name in ("1.png", "2.png", "photo.jpg"):
        (folder / name).unlink()
    for i in (0, 3):
        write_image(tmp_path / "masks" / f"{i}.png", seed=10 + i)
    (folder / "0.txt").write_text("cat")
    text = SUBSET.replace("class_tokens = 'x'", "caption_extension = 'txt'") + "'{root}/a'\n"
    text += "conditioning_data_dir = '{root}/masks'\n"
    assert list_names(find.toml(text, "--masked_loss", "--on_missing_caption", "skip")) == ["0.png"]


def test_nothing_left_is_a_fault(find, tmp_path):
    damage(write_image(tmp_path / "a" / "0.png"))
    with pytest.raises(UserError) as error:
        find.toml(SUBSET + "'{root}/a'", *SKIP)
    assert error.value.code == "all-images-skipped"
