"""Images of which their mask leaves nothing are named; each mask is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.data import empty_masks
from sfumato.data.masks import MaskItem
from toy_runs import make_arguments, make_images


def set_alpha(path: Path, value: int) -> None:
    with Image.open(path) as image:
        pixels = image.convert("RGBA")
    pixels.putalpha(Image.new("L", pixels.size, value))
    pixels.save(path)


@pytest.mark.full
@pytest.mark.parametrize("cached", [True, False])
def test_images_without_anything_left_are_named_once(
    cached: bool,
    toy_shelf: ToyShelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = make_images(tmp_path / "images")
    for name, value in (("0", 0), ("1", 255), ("2", 0), ("3", 1)):
        set_alpha(images / "2_cat" / f"{name}.png", value)
    read: list[str] = []
    normal = MaskItem.read

    def count(item: MaskItem) -> Any:
        read.append(Path(item.image.path).name)
        return normal(item)

    monkeypatch.setattr(empty_masks.MaskItem, "read", count)
    options = {"alpha_mask": True, "cache_latents": cached, "max_train_steps": 1, "cache_dir": tmp_path / "cache"}
    for again in (False, True):
        read.clear()
        assert main(["train", *make_arguments(toy_shelf.paths("sd"), images, tmp_path / f"out{again}", **options)]) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "leave nothing" in line]
        assert "0.png" in line
        assert "2.png" in line
        checks, fills = (0 if again else 5), (5 if cached else 0)  # a latent cache in memory has masks of its own
        assert len(read) == checks + fills
    set_alpha(images / "2_cat" / "0.png", 9)
    assert main(["train", *make_arguments(toy_shelf.paths("sd"), images, tmp_path / "more", **options)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "leave nothing" in line]
    assert "0.png" not in line
    assert "2.png" in line


def test_without_masks_nothing_is_read(toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(item: MaskItem) -> np.ndarray:
        raise AssertionError(item)

    monkeypatch.setattr(empty_masks.MaskItem, "read", refuse)
    argv = make_arguments(toy_shelf.paths("sd"), make_images(tmp_path / "images"), tmp_path / "out", max_train_steps=1)
    assert main(["train", *argv, "--cache_dir", str(tmp_path / "cache")]) == 0
