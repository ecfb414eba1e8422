"""The peak that a rehearsal predicts is the peak of the step, for published sizes with random weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from gpu.conftest import Record
from gpu.device_runs import BENCHMARK, load_benchmark

SHARE, BYTES = 0.05, 0.5  # GiB; what libraries take as workspaces, and what rounding to the allocator's blocks adds
ROWS = {"sd15-plain": 6, "sdxl-checkpointed": 10, "sd3-checkpointed": 20, "flux-checkpointed": 34}  # -> GiB of a card
SECONDS = 110  # for the slowest of them, its rehearsal included


@pytest.mark.parametrize("name", ROWS)
def test_rehearsed_against_measured(name: str, record: Record) -> None:
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory < ROWS[name]:
        pytest.skip(f"needs a card with {ROWS[name]} GiB, this one has {memory:.0f}")
    torch.cuda.empty_cache()
    command = [sys.executable, str(BENCHMARK), "--row", name, "--steps", "3", "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    result = load_benchmark().read_result(name, done.returncode, done.stdout, done.stderr)
    record(**json.loads(json.dumps(result)))
    assert result["outcome"] == "measured"
    assert result["peak_gib"] == pytest.approx(result["rehearsed_gib"], rel=SHARE, abs=BYTES)
