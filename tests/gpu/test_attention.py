"""Each kernel of attention that this GPU has: loss and gradients of a step are those of torch's choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families.toys import ToyShelf
from gpu.conftest import Record
from gpu.device_runs import BOUNDS, FAMILIES, take_first_step
from sfumato.config.memory import MemoryOptions
from sfumato.memory.attention import PACKAGES, find_attention_obstacle

MASKED = ("chroma", "lumina")
NAMES = ("math", "cudnn", *PACKAGES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same(
    family: str, name: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, cuda: torch.device, record: Record
) -> None:
    memory = MemoryOptions(mixed_precision="bf16", attention=name)  # pyright: ignore
    obstacle, _ = find_attention_obstacle(name, memory, masked=family in MASKED)
    if obstacle:
        pytest.skip(f"{name}: {obstacle}")
    toy, options = toy_shelf.paths(family), {"mixed_precision": "bf16", "no_half_vae": True}
    expected = take_first_step(cuda, toy, images, tmp_path / "plain", **options)
    far = take_first_step(cuda, toy, images, tmp_path / "found", **options, attention=name).compare(expected)
    record(loss=far.loss, gradient=far.gradient)
    assert far.loss <= BOUNDS["bf16"].loss
    assert far.gradient <= BOUNDS["bf16"].gradient
