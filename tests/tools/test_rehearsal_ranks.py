"""What each of several processes that share a model needs, against closed forms of the parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.config import load_config
from sfumato.plan import make_run_plan
from sfumato.tools.rehearsal_stages import STEP, Stage, format_ranks
from sfumato.tools.rehearse import ALLOWANCE, describe_fit, rehearse_plan
from toy_runs import make_arguments, make_images

pytestmark = [pytest.mark.full, needs_rehearsal]
FULL = {"method": "full", "network_dim": None, "cache_latents": True, "cache_text_encoder_outputs": True}
FULL |= {"gradient_accumulation_steps": 2}  # so that gradients are there at the peak
COUNTS = (1, 2, 4, 8)


def rehearse(toy_shelf: ToyShelf, tmp_path: Path, **options: Any) -> tuple[dict[str, Stage], int]:
    """Stages by name, and how many numbers are trained."""
    shared = {
        name: options.pop(name)
        for name in ("fsdp", "fsdp_offload_params", "deepspeed", "zero_stage")
        if name in options
    }
    argv = make_arguments(toy_shelf.paths("flux"), make_images(tmp_path / "images", 2), tmp_path / "out", **options)
    plan = make_run_plan(load_config(argv), processes=1)
    plan = replace(plan, config=plan.config.with_values(shared))
    stages = rehearse_plan(plan, saves=False, processes=COUNTS)
    return {stage.name: stage for stage in stages}, sum(part.parameters for part in plan.parts)


def test_fsdp(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Of one process all is its own; more have parts of weights, gradients and moments beside whole blocks."""
    stages, trained = rehearse(toy_shelf, tmp_path, **FULL, fsdp=True)
    peaks = {rank.processes: rank.peak for rank in stages["loading"].by_rank}
    weights = stages["loading"].resident["denoiser"]
    assert peaks[1] - peaks[2] == pytest.approx(weights / 2, abs=8)
    assert peaks[2] - peaks[4] == pytest.approx(weights / 4, abs=8)
    whole = peaks[1] - stages["loading"].peak  # blocks and what is in none, whole: some, and not nearly all
    assert 0 < whole < 2 * weights
    step = {rank.processes: rank.peak for rank in stages[STEP].by_rank}
    assert step[1] == stages[STEP].peak + whole
    # weights, gradients and two moments, 4 bytes each, of every trained number
    assert step[2] - step[8] >= 0.99 * 16 * trained * (1 / 2 - 1 / 8)
    lines = list(describe_fit(list(stages.values()), ALLOWANCE + (step[2] + step[4]) // 2))
    assert any(line.startswith("2 processes: does not fit: training step") for line in lines)
    assert any(line.startswith("4 processes: every stage fits") for line in lines)


def test_what_waits_in_main_memory_needs_nothing(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    stages, _ = rehearse(toy_shelf, tmp_path, **FULL, fsdp=True, fsdp_offload_params=True)
    assert len({rank.peak for rank in stages["loading"].by_rank}) == 1
    assert len({rank.peak for rank in stages[STEP].by_rank}) == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages(toy_shelf: ToyShelf, tmp_path: Path, stage: int) -> None:
    """What gets smaller with more processes, in bytes of a trained number: moments and masters, gradients, weights."""
    options = {"mixed_precision": "bf16", "deepspeed": True, "zero_stage": stage}
    stages, trained = rehearse(toy_shelf, tmp_path, **FULL, **options)
    peaks = {rank.processes: rank.peak for rank in stages["loading"].by_rank}
    assert peaks[2] - peaks[4] == pytest.approx((4 + (2 if stage == 3 else 0)) * trained / 4, rel=0.02)
    step = {rank.processes: rank.peak for rank in stages[STEP].by_rank}
    shared = 16 + (2 if stage == 3 else 0)
    assert step[2] - step[8] >= 0.99 * shared * trained * (1 / 2 - 1 / 8)
    assert [line.split()[0] for line in format_ranks(list(stages.values()))][1:] == [name.split()[0] for name in stages]
