"""A step on the GPU has the loss and the gradients of the CPU's, for every family."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from families.toys import ToyShelf
from gpu.conftest import Record
from gpu.device_runs import BOUNDS, CPU, FAMILIES, take_first_step


@pytest.mark.parametrize("precision", sorted(BOUNDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(
    family: str, precision: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, cuda: torch.device, record: Record
) -> None:
    toy, options = toy_shelf.paths(family), {"mixed_precision": precision}
    expected = take_first_step(CPU, toy, images, tmp_path / "cpu", **options)
    found = take_first_step(cuda, toy, images, tmp_path / "gpu", **options).compare(expected)
    record(**asdict(found), bounds=asdict(BOUNDS[precision]))
    assert found.loss <= BOUNDS[precision].loss
    assert found.gradient <= BOUNDS[precision].gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_changes_nothing(
    family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, cuda: torch.device, record: Record
) -> None:
    toy = toy_shelf.paths(family)
    plain = take_first_step(cuda, toy, images, tmp_path / "plain")
    found = take_first_step(cuda, toy, images, tmp_path / "again", gradient_checkpointing=True).compare(plain)
    record(**asdict(found))
    assert found.loss <= 1e-6
    assert found.gradient <= 1e-5
