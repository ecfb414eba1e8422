"""Memory options on the GPU: several steps with each train what they train without, whatever was copied meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from gpu.conftest import Record
from gpu.device_runs import CACHED, FAMILIES, train_on
from toy_runs import read_weights

FULL = {"method": "full", "network_dim": None, "learning_rate": "1e-4", "network_train_unet_only": None}
SHARED: dict[str, Any] = {"optimizer_type": "SGD", "max_train_steps": 6, "max_grad_norm": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "some blocks in main memory": {"blocks_to_swap": 2},
    "all blocks and their inputs in main memory": {"blocks_to_swap": 99, "cpu_offload_checkpointing": True},
    "all blocks in the file": {"blocks_to_swap": 99, "stream_blocks": True},
    "every second block recomputed": {"checkpoint_every": 2},
    "whole model, steps within backward": {**FULL, "fused_backward_pass": True},
    "whole model, in main memory": {**FULL, "fused_backward_pass": True, "blocks_to_swap": 99},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_is_trained(
    family: str, name: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, cuda: torch.device, record: Record
) -> None:
    toy, options = toy_shelf.paths(family), {**CACHED, **SHARED, **OPTIONS[name]}
    plain = {**CACHED, **SHARED, **(FULL if "method" in options else {})}
    expected = read_weights(train_on(cuda, toy, images, tmp_path / "plain", **plain))
    start = time.perf_counter()
    found = read_weights(train_on(cuda, toy, images, tmp_path / "found", **options))
    far = max(float((found[each].float() - expected[each].float()).abs().max()) for each in found)
    record(seconds=time.perf_counter() - start, weights=far)
    assert found.keys() == expected.keys()
    assert far <= 1e-4
