"""The loss watch: images by their loss against the mean of its noise level, in the report and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.test_batch_sampler import make_plan
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.track.image_list import find_image_list, read_image_list, write_image_list
from sfumato.track.loss_watch import LEVEL_SAMPLES, MAX_LEVELS, level_means, rank_images
from sfumato.track.report import rebuild_report
from track.report_pages import PageParser, write_lines

EVIL = "</p><script>alert(1)</script>"


def draw_samples(*, images: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t, loss and image number; the loss depends on t alone, by a factor of e^3 over its range."""
    rng = np.random.default_rng(seed)
    t = rng.uniform(0, 1000, images * each)
    return t, np.exp(-3 * t / 1000) * rng.uniform(0.9, 1.1, len(t)), np.tile(np.arange(images), each)


def test_level_means_are_those_of_parts_with_equally_many_samples() -> None:
    t, losses, _ = draw_samples(images=10, each=100)
    parts = np.array_split(np.argsort(t), MAX_LEVELS)
    expected = np.empty(len(t))
    for part in parts:
        expected[part] = losses[part].mean()
    np.testing.assert_allclose(level_means(t, losses), expected, rtol=1e-12)
    few = slice(LEVEL_SAMPLES + 1)
    np.testing.assert_allclose(level_means(t[few], losses[few]), losses[few].mean())


def test_a_factor_on_an_image_is_found_whatever_its_timesteps() -> None:
    """By raw loss the image that is always seen with little noise would be the first, and the odd one the last."""
    t, losses, images = draw_samples(images=20, each=60)
    t = np.where(images == 3, t / 10, np.where(images == 7, 900 + t / 10, t))
    losses = np.exp(-3 * t / 1000) * np.where(images == 7, 1.5, 1.0)
    raw = [losses[images == i].mean() for i in range(20)]
    assert (int(np.argmax(raw)), int(np.argmin(raw))) == (3, 7)
    ranked = rank_images(t, losses, images)
    assert ranked[0].number == 7
    assert ranked[0].ratio == pytest.approx(1.5, rel=0.25)  # it is part of its levels' means itself
    assert all(abs(image.ratio - 1) < 0.1 for image in ranked[1:])
    assert {image.samples for image in ranked} == {60}


def test_images_that_are_rare_or_not_listed_are_not_ranked() -> None:
    t, losses, images = draw_samples(images=10, each=6)
    images[images == 9] = -1
    images[np.flatnonzero(images == 8)[:2]] = -1  # four are left
    assert sorted(image.number for image in rank_images(t, losses, images)) == list(range(8))
    images[images == 0] = -1
    assert rank_images(t, losses, images) == ()
    assert rank_images([], [], []) == ()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 60 steps on ten images, of which the fourth has twice the loss of the others."""
    rng = np.random.default_rng(0)
    listed = []
    for i in range(10):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(path)
        listed.append({"path": str(path), "caption": f"{EVIL} number {i}"})
    (tmp_path / "images" / "5.png").unlink()
    path = find_image_list(tmp_path, "cat")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in listed))
    rows = []
    for step in range(1, 61):
        t = rng.uniform(0, 1000, 5)
        numbers = [i for i in range(10) if i % 2 == step % 2]
        losses = [float(np.exp(-t[k] / 300) * (1 + (i == 3))) for k, i in enumerate(numbers)]
        row = {"step": step, "loss/current": 1.0, "timesteps": t.tolist(), "loss/samples": losses, "images": numbers}
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "cat.run.jsonl").write_text("".join(rows))
    return tmp_path


def test_the_report_shows_images_and_captions(run: Path) -> None:
    text = rebuild_report(run, None).read_text()
    page = PageParser(text)  # which asserts that tags are closed, so that nothing was left unescaped
    assert "Images by their loss" in page.text
    names = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert names[0] == "3.png"
    assert sorted(map(str, names)) == [f"{i}.png" for i in range(10) if i != 5]
    assert "cannot be read" in page.text
    assert str(run) not in text
    assert f"{EVIL} number 3" in page.text


def test_a_run_that_says_no_images_has_no_such_section(tmp_path: Path) -> None:
    write_lines(tmp_path, range(1, 100))
    assert "Images by their loss" not in rebuild_report(tmp_path, None).read_text()


@pytest.mark.parametrize("name", ["", "cat.run.jsonl"])
def test_inspect_lists_the_images_of_a_run(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "inspect", "--run", str(run / name), "--html", str(run / "page.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3.png" in lines[1]
    assert len(lines) == 12
    page = PageParser((run / "page.html").read_text())
    assert next(attributes["alt"] for tag, attributes in page.tags if tag == "img") == "3.png"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "image-list-missing"),
        ("[1]\n", "image-list-invalid"),
        ('{"path": 1, "caption": ""}\n', "image-list-invalid"),
    ],
)
def test_a_list_that_is_missing_or_damaged(run: Path, content: str | None, code: str) -> None:
    path = find_image_list(run, "cat")
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        main_of_inspect(run)
    assert caught.value.code == code


def test_too_few_samples(run: Path) -> None:
    path = run / "cat.run.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(UserError, match="too few images"):
        main_of_inspect(run)


def main_of_inspect(run: Path) -> None:
    from sfumato.tools.run_losses import show_run_losses

    show_run_losses(run, html=None, images_on_page=5)


def test_images_keep_their_numbers_when_a_run_is_resumed_with_others(tmp_path: Path) -> None:
    path = tmp_path / "cat.images.jsonl"
    assert write_image_list(path, make_plan([[(1, 2), (1, 1)], [(2, 2)]]), continued=False) == [0, 1, 2, 3, 4]
    before = read_image_list(path)
    assert [image.caption for image in before] == ["0 0 0", "0 0 1", "0 1 0", "1 0 0", "1 0 1"]
    assert write_image_list(path, make_plan([[(1, 1), (1, 2)], [(2, 1)]]), continued=True) == [0, 2, 5, 3]
    assert read_image_list(path)[:5] == before
    assert read_image_list(path)[5].caption == "0 1 1"
    assert write_image_list(path, make_plan([[(1, 1), (1, 2)]]), continued=False) == [0, 1, 2]
    assert len(read_image_list(path)) == 3
    path.unlink()
    assert write_image_list(path, make_plan([[(1, 1)]]), continued=True) == ()  # the numbers before are not known
    assert not path.exists()
