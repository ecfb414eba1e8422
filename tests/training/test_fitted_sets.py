"""Every set of options that docs/performance.md gives for a card trains at toy size, and resumes bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from families.toys import ToyShelf
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
TOYS = {"FLUX.1 dev": "flux", "SDXL": "sdxl"}
COMMON = {"mixed_precision": "bf16", "cache_latents": True, "cache_text_encoder_outputs": True}


def read_options(words: str) -> dict[str, Any]:
    """As on a command line."""
    pairs = re.findall(r"--(\w+)((?: (?!--)\S+)*)", words)
    return {name: value.strip() or True for name, value in pairs}


def list_sets() -> list[Any]:
    """(toy, options) of each row of the table; its name is the run with the card."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        model, _, _ = cells[0].partition(",")
        if model in TOYS and len(cells) == 5 and cells[1].endswith("GB"):
            options = read_options(f"{cells[2]} {cells[3]}".replace("`", " "))
            rows.append(pytest.param(TOYS[model], options, id=f"{cells[0]}, {cells[1]}, {len(rows)}"))
    return rows


SETS = list_sets()


def test_the_table_has_the_models_and_cards() -> None:
    names = " ".join(str(row.id) for row in SETS)
    for wanted in ("LoRA, 8 GB", "LoRA, 16 GB", "SDXL, LoRA, 6 GB", "SDXL, whole, 16 GB", "FLUX.1 dev, whole, 24 GB"):
        assert wanted in names
    assert read_options("--a 1 --b --c x y") == {"a": "1", "b": True, "c": "x y"}


@pytest.mark.full
@pytest.mark.parametrize(("family", "options"), SETS)
def test_it_trains_and_resumes(family: str, options: dict[str, Any], toy_shelf: ToyShelf, tmp_path: Path) -> None:
    images, toy = make_images(tmp_path / "images", 2), toy_shelf.paths(family)
    whole = options.get("method") == "full"
    options = {**COMMON, **options, "network_dim": None if whole else 2, "learning_rate": "1e-2"}
    straight = train_toy(
        toy, images, tmp_path / "straight", **options, max_train_steps=3, save_state=True, save_every_n_steps=2
    )
    state = tmp_path / "straight" / "lora-step00000002-state"
    resumed = train_toy(toy, images, tmp_path / "resumed", **options, max_train_steps=3, resume=state)
    assert equal_tensors(read_weights(resumed), read_weights(straight))
    assert read_metrics(resumed) == read_metrics(straight)[2:]
    earlier = read_weights(tmp_path / "straight", "lora-step00000002")
    assert not equal_tensors(earlier, read_weights(straight))
