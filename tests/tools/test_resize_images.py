"""Smaller copies of images: their sizes, names and pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.compat.launch import main as launch


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "wide.png")
    Image.new("RGB", (40, 30), "red").save(folder / "small.png")
    (folder / "wide.txt").write_text("wide")
    (folder / "notes.md").write_text("notes")
    return folder


def test_copies(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "copies"
    words = ["dataset", "resize", str(images), str(target), "--max_resolution", "64x64,400x100", "--save_as_png"]
    assert main([*words, "--divisible_by", "8", "--copy_associated_files"]) == 0
    sizes = {path.name: Image.open(path).size for path in target.glob("*.png")}
    assert sizes == {
        "wide+64x64.png": (88, 40), "wide+400x100.png": (200, 96),
        "small+64x64.png": (40, 24), "small+400x100.png": (40, 24),
    }  # fmt: skip
    assert {path.name for path in target.iterdir()} - set(sizes) == {
        "wide.txt", "wide+64x64.txt", "wide+400x100.txt", "notes.md"
    }  # fmt: skip
    original = np.asarray(Image.open(images / "wide.png"))
    assert np.array_equal(np.asarray(Image.open(target / "wide+400x100.png")), original[2:98])


@pytest.mark.parametrize("name", ["area", "lanczos4", "nearest"])
def test_the_script(images: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "copies"
    words = ["tools/resize_images_to_resolution", "--interpolation", name, "--max_resolution", "100x50"]
    assert launch([*words, str(images), str(target), "--save_as_png"]) == 0
    filters = {"area": Image.Resampling.BOX, "lanczos4": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
    expected = Image.open(images / "wide.png").resize((100, 50), filters[name])
    assert np.array_equal(np.asarray(Image.open(target / "wide+100x50.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("same folder", "resize-into-source"),
        ("resolution", "resize-resolution-invalid"),
        ("empty", "image-folder-empty"),
        ("names", "resize-names-equal"),
    ],
)
def test_faults(images: Path, tmp_path: Path, codes: list[str], change: str, code: str) -> None:
    target = images if change == "same folder" else tmp_path / "copies"
    if change == "empty":
        images = tmp_path / "none"
        images.mkdir()
    if change == "names":
        Image.new("RGB", (40, 30)).save(images / "wide.jpg")
    size = "64" if change == "resolution" else "64x64"
    assert main(["dataset", "resize", str(images), str(target), "--max_resolution", size]) == 2
    assert codes == [code]


def test_an_unreadable_image_is_named(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (images / "cut.png").write_bytes((images / "wide.png").read_bytes()[:90])
    assert main(["dataset", "resize", str(images), str(tmp_path / "copies")]) == 0
    assert "cut.png" in capfd.readouterr().err
    assert len(list((tmp_path / "copies").glob("*.jpg"))) == 8
