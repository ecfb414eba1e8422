"""The steady step on the GPU: it never waits for the device, and compiled blocks share their graphs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from families.toys import ToyShelf
from gpu.conftest import Record
from gpu.device_runs import CACHED, FAMILIES, build_run_on, no_waiting, take_first_step, take_steps

FIRST = 8  # steps: an epoch, after which every caption was encoded, and what is checked once has been checked
LORA = {"mixed_precision": "bf16", "gradient_checkpointing": True}
COMPILED: dict[str, Any] = {"compile": True}
FULL = {"method": "full", "network_dim": None, "cache_latents": True, "learning_rate": "1e-4"}


@pytest.mark.parametrize(
    "options",
    [{**CACHED, **LORA}, FULL, {**CACHED, **LORA, "blocks_to_swap": 3}],
    ids=["adapter", "whole model", "blocks in main memory"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_steady_step_waits_nowhere(
    family: str, options: dict[str, Any], toy_shelf: ToyShelf, images: Path, tmp_path: Path, cuda: torch.device,
    record: Record,
) -> None:  # fmt: skip
    toy = toy_shelf.paths(family)
    run = build_run_on(cuda, toy, images, tmp_path, **options, max_train_steps=20)
    with run.output_lock:
        take_steps(run, FIRST)
        start = time.perf_counter()
        with no_waiting(cuda):
            take_steps(run, 3, FIRST)
        record(enqueued_s=(time.perf_counter() - start) / 3)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_compiled_blocks(
    family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, cuda: torch.device, record: Record
) -> None:
    """The losses of the plain step; after the first steps nothing is compiled again."""
    toy = toy_shelf.paths(family)
    plain = take_first_step(cuda, toy, images, tmp_path / "plain")
    found = take_first_step(cuda, toy, images, tmp_path / "compiled", **COMPILED).compare(plain)
    torch._dynamo.reset()
    counters.clear()
    run = build_run_on(cuda, toy, images, tmp_path / "run", **CACHED, **COMPILED, max_train_steps=20)
    with run.output_lock:
        take_steps(run, FIRST)
        early = counters["stats"]["unique_graphs"]
        take_steps(run, 6, FIRST)
    late = counters["stats"]["unique_graphs"]
    record(loss=found.loss, gradient=found.gradient, graphs=late, graphs_after_first_steps=early)
    assert found.loss <= 1e-4
    assert found.gradient <= 1e-3
    assert early == late
    assert early > 0
