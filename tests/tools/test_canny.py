"""`sfumato dataset canny`: pixel by pixel what OpenCV finds, for an image and for a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.compat.launch import main as launch
from sfumato.data.edges import find_edges
from tools.test_dataset_review import draw_discs

EDGES = {  # of cv2.Canny 5.0.0 (apertures of 3, L1): thresholds -> number of edge pixels, SHA-256 of them as bits
    ("discs", 32, 224): (382, "b6a6b281cdf5ee8c"),
    ("noise", 32, 224): (1741, "704aaba890a5fd1a"),
    ("noise", 63, 191): (1754, "084df5221a4baa27"),
    ("noise", 200, 100): (1753, "753202b3c968419a"),
}


def make_noise(height: int, width: int) -> np.ndarray:
    """Blurred noise in three channels over the whole range."""
    pixels = np.random.default_rng(0).uniform(0, 255, (height, width, 3))
    for axis in (0, 1):
        padding = [(3, 3) if i == axis else (0, 0) for i in range(3)]
        sums = np.cumsum(np.pad(pixels, padding, mode="wrap"), axis)
        pixels = np.take(sums, range(6, sums.shape[axis]), axis) - np.take(sums, range(sums.shape[axis] - 6), axis)
    return ((pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255).astype(np.uint8)


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges_are_those_of_opencv(case: tuple[str, int, int]) -> None:
    name, low, high = case
    edges = find_edges(np.asarray(draw_discs(1)) if name == "discs" else make_noise(60, 80), low, high)
    assert (int(edges.sum()), hashlib.sha256(np.packbits(edges).tobytes()).hexdigest()[:16]) == EDGES[case]


def test_a_step_is_one_line_and_weak_edges_need_a_strong_one() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, 20:] = 200  # 4 x 200 across the edge
    pixels[20:, 20:] = 20
    strong = find_edges(pixels, 300, 500)
    assert (strong[:18].sum(1) == 1).all()
    assert not strong[24:].any()
    assert find_edges(pixels, 50, 500)[24:39].any()  # it hangs together with the strong one
    pixels[15:25] = 0
    assert not find_edges(pixels, 50, 500)[30:39, 5:].any()


def test_an_image_and_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    draw_discs(0).save(folder / "a.png")
    draw_discs(1).save(folder / "b.jpg", quality=100)
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:99])
    assert launch(["tools/canny", "--input", str(folder / "a.png"), "--output", str(tmp_path / "edges.png")]) == 0
    expected = find_edges(np.asarray(draw_discs(0))[..., ::-1], 32, 224)
    assert (np.asarray(Image.open(tmp_path / "edges.png")) == expected * 255).all()
    assert main(["dataset", "canny", "--input", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("source", "target", "code"),
    [
        ("images", "images", "canny-into-source"),
        ("images/a.png", "images/a.png", "canny-onto-image"),
        ("absent.png", "x.png", "canny-input-missing"),
    ],
)
def test_faults(tmp_path: Path, codes: list[str], source: str, target: str, code: str) -> None:
    (tmp_path / "images").mkdir()
    draw_discs(0).save(tmp_path / "images" / "a.png")
    before = (tmp_path / "images" / "a.png").read_bytes()
    assert main(["dataset", "canny", "--input", str(tmp_path / source), "--output", str(tmp_path / target)]) == 2
    assert (tmp_path / "images" / "a.png").read_bytes() == before
    assert codes == [code]
