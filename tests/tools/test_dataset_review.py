"""`sfumato dataset dedupe`: hashes and blur as other packages compute them, planted faults found, nothing changed."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sfumato.cli.main import main
from sfumato.tools.caption_faults import list_text_faults
from sfumato.tools.image_hash import find_close_pairs, group_pairs, hash_image
from sfumato.tools.image_quality import estimate_quality, measure_blockiness, measure_blur, measure_clipped, to_gray
from track.report_pages import PageParser

# Of draw_discs(seed): imagehash.phash 4.3.2, and of the image mirrored; skimage.measure.blur_effect 0.26.
PHASHES = ("99a53b32674763b0", "c9d0db4270e21f9d", "c406f3893672f30f", "cdd2728d69cc3256")
MIRRORED_PHASHES = ("ccf86e67321232e9", "dc858e1765b749c8", "9153a6dc6327565a", "988727dc3c996743")
BLURS = (0.29442712218743383, 0.2768173059620787, 0.28942095791549766, 0.2792548757532598)


def draw_discs(seed: int, width: int = 96, height: int = 64, scale: int = 1) -> Image.Image:
    y, x = np.mgrid[0 : height * scale, 0 : width * scale] / scale
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height * scale, width * scale, 3))
    for _ in range(6):
        left, top, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(6, 24)
        pixels[(x - left) ** 2 + (y - top) ** 2 < radius * radius] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("seed", range(4))
def test_hash_and_blur_are_those_of_imagehash_and_skimage(seed: int) -> None:
    image = draw_discs(seed)
    assert [f"{value:016x}" for value in hash_image(image)] == [PHASHES[seed], MIRRORED_PHASHES[seed]]
    assert measure_blur(to_gray(image)) == pytest.approx(BLURS[seed], rel=1e-9)


def test_blur_grows_with_blurring_and_is_none_without_edges() -> None:
    image = draw_discs(0, scale=4)
    blurs = [measure_blur(to_gray(image.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 1, 2, 4, 8)]
    assert blurs == sorted(blurs)
    assert blurs[0] < 0.4 < 0.75 < blurs[-1]
    assert measure_blur(np.full((64, 64), 0.5)) == 0
    assert measure_blur(np.zeros((5, 64))) == 0


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 51, 75, 95, 100])
def test_the_quality_of_a_jpeg_is_the_one_it_was_saved_with(quality: int) -> None:
    data = BytesIO()
    draw_discs(1).save(data, "JPEG", quality=quality)
    assert estimate_quality(data.getvalue()) == quality
    png = BytesIO()
    draw_discs(1).save(png, "PNG")
    assert estimate_quality(png.getvalue()) is None


def test_blocks_are_found_after_the_file_is_saved_as_another_kind() -> None:
    blocks = {}
    for quality in (5, 95):
        data = BytesIO()
        draw_discs(2, 128, 128, scale=2).save(data, "JPEG", quality=quality)
        blocks[quality] = measure_blockiness(to_gray(Image.open(data)))
    assert blocks[5] > 1.5 > 1.2 > blocks[95]
    assert measure_blockiness(np.full((64, 64), 0.5)) == 1


def test_clipped_pixels_do_not_count_where_they_are_the_background() -> None:
    pixels = np.full((10, 10, 3), 128, np.uint8)
    pixels[2:7, :4] = 255
    pixels[8:, :5] = 0
    assert measure_clipped(pixels) == pytest.approx(0.3)
    assert measure_clipped(np.full((10, 10, 3), 255, np.uint8)) == 0


def test_close_pairs_and_their_groups_are_those_of_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 40, np.uint64)
    hashes[7] = hashes[3] ^ np.uint64(0b1011)
    hashes[20] = hashes[7] ^ np.uint64(1 << 40)
    pairs = list(find_close_pairs(hashes, hashes, 3))
    plain = [(i, j) for i in range(40) for j in range(i + 1, 40) if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 3]
    assert pairs == plain == [(3, 7), (7, 20)]
    assert group_pairs(40, pairs) == [[3, 7, 20]]


FAULTS = [
    (None, "1girl, solo, 1girl", {"repeated tags"}),
    (None, r"long_hair, blue_eyes, Blue Eyes, long \(hair\)", {"repeated tags"}),
    (None, "1girl, 2girls", {"contradictory tags"}),
    (None, "solo, 1girl, 1boy", {"contradictory tags"}),
    (None, "no humans, 1boy", {"contradictory tags"}),
    (None, "1girl, multiple girls", {"contradictory tags"}),
    (None, "1girl, long hair, short hair", {"contradictory tags"}),
    (None, "2girls, long hair, short hair", set()),
    (None, "2girls, multiple girls, 1boy", set()),
    ("a cat, asleep", "a cat, asleep", {"caption repeats the tags"}),
    ("two girls in a park", "1girl, solo", {"caption contradicts tags"}),
    ("two small girls in a park", "2girls", set()),
    ("a girl beside three men", "1girl, 3boys", set()),
    ("a man with a hat", "1girl, hat", {"caption contradicts tags"}),
    ("a woman with a hat", "1girl, hat", set()),
    ("a girl stands there", "no humans", {"caption contradicts tags"}),
    ("a girl with blonde hair and red eyes", "1girl, black hair, red eyes", {"caption contradicts tags"}),
    ("a girl with blonde hair and gray eyes", "1girl, yellow hair, grey eyes", set()),
    ("a girl with blonde hair", "2girls, black hair", set()),
    ("a house", "house", {"caption repeats the tags"}),
    ("a house on a hill", None, set()),
    (None, None, set()),
]


@pytest.mark.parametrize(("caption", "tags", "kinds"), FAULTS)
def test_texts_that_cannot_be_right(caption: str | None, tags: str | None, kinds: set[str]) -> None:
    if caption == "a house":
        caption = "House "
    assert {kind for kind, _ in list_text_faults(caption, tags)} == kinds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    image = draw_discs(0, scale=5)
    image.save(folder / "a.png")
    image.resize((300, 200)).save(folder / "a-small.jpg", quality=80)
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "a-mirrored.png")
    image.point(lambda value: min(255, value * 9 // 8)).save(folder / "a-bright.png")
    Image.fromarray(np.asarray(image)[:, :, [1, 2, 0]]).save(folder / "other-colors.png")
    draw_discs(1, scale=5).filter(ImageFilter.GaussianBlur(9)).save(folder / "soft.png")
    draw_discs(2, scale=5).save(folder / "blocks.jpg", quality=8)
    draw_discs(3, scale=1).save(folder / "small.png")
    (folder / "small.txt").write_text("<b>, 1girl, 1girl")
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:900])
    (folder / "text.png").write_text("no image")
    return folder


def hash_tree(folder: Path) -> dict[str, tuple[str, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in paths}


def test_planted_faults_are_found_and_nothing_is_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hash_tree(folder)
    assert main(["dataset", "dedupe", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    assert hash_tree(folder) == before
    lines = capsys.readouterr().out.splitlines()
    (duplicates,) = [line for line in lines if line.startswith("near-duplicates")]
    assert duplicates.startswith("near-duplicates of a")
    assert all(name in duplicates for name in ("a.png", "a-small.jpg", "a-mirrored.png", "a-bright.png"))
    assert "other-colors" not in duplicates
    found: dict[str, set[str]] = {}
    kind = ""
    for line in lines:
        name = line.split(":")[0].strip()
        if line.startswith("  "):
            found[kind].add(name)
        else:
            kind, found[name] = name, set()
    assert found["unreadable"] == {"torn.png", "text.png"}
    assert found["tiny"] == {"small.png", "a-small.jpg"}
    assert found["blurry"] == {"soft.png"}
    assert found["over-compressed"] == {"blocks.jpg"}
    assert found["repeated tags"] == {"small.png"}
    page = PageParser((tmp_path / "page.html").read_text())
    names = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert set(map(str, names[:4])) == {"a.png", "a-small.jpg", "a-mirrored.png", "a-bright.png"}
    assert "<b>, 1girl, 1girl" in page.text
    assert "cannot be read" in page.text


def test_a_clean_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_discs(0, scale=5).save(tmp_path / "a.png")
    assert main(["dataset", "dedupe", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert "nothing was found" in capsys.readouterr().out
    assert "Nothing was found" in PageParser((tmp_path / "page.html").read_text()).text
