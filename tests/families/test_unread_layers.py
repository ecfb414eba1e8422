"""Layers of text encoders that a model does not read: known before, so no warning about their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from families.toys import ToyShelf
from sfumato.train import train_step
from toy_runs import build_toy_run, make_images

CASES = [
    ("sd", {}),
    ("sd", {"clip_skip": 2}),
    ("sdxl", {}),
    ("sd3", {}),
    ("flux", {}),
    ("lumina", {}),
    ("sdxl", {"method": "full", "train_text_encoder": True, "network_dim": None}),
    ("sd", {"method": "full", "train_text_encoder": True, "network_dim": None, "clip_skip": 2}),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 2)


@pytest.mark.parametrize(("family", "options"), CASES)
def test_no_warning_in_the_first_step(
    family: str, options: Mapping[str, Any], toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """And exactly the weights without a gradient are among the layers that are not read."""
    run = build_toy_run(toy_shelf.paths(family), images, tmp_path, **options)
    train_step(run, next(iter(run.loader.steps(0))))
    assert run.method.report() == []
    method: Any = run.method
    method.unread = type(method.unread)()
    still = [line for line in method.report() if "got no gradient" in line]
    assert bool(still) == (family in ("sdxl", "lumina") or "clip_skip" in options)


def test_the_cache_alone_keeps_an_encoder_from_training(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy = toy_shelf.paths("lumina")
    run = build_toy_run(toy, images, tmp_path, cache_text_encoder_outputs=True)
    method: Any = run.method
    assert {name.split("_")[1] for name in method.engine.export_tensors()} == {"unet"}
    assert method.live_text == frozenset()
    assert sum("--cache_text_encoder_outputs" in note for note in run.plan.notes) == 1
    only = build_toy_run(toy, images, tmp_path, cache_text_encoder_outputs=True, network_train_unet_only=True)
    assert not any("--cache_text_encoder_outputs" in note for note in only.plan.notes)
