"""What `sfumato train` refuses before it begins: a run that cannot fit the GPU that is there.

A bound from file headers takes less than a second. Where it is near the GPU's memory the run is rehearsed, and the
result is remembered beside the dataset index for as long as nothing changes that memory depends on.
"""

from __future__ import annotations

import math
import os
import sys

import torch

from sfumato.common.text import GIB
from sfumato.config import Config
from sfumato.config.environment import read_launch
from sfumato.data.find.index import Index
from sfumato.errors import Problems, UserError
from sfumato.memory.rehearsal.backend import is_supported
from sfumato.methods.model_plan import plan_model
from sfumato.plan import make_run_plan
from sfumato.tools.memory_bound import MemoryBound, bound_memory
from sfumato.tools.peak_index import find_peak_index, load_peak, save_peak
from sfumato.tools.rehearsal_stages import GB
from sfumato.tools.rehearse import ALLOWANCE
from sfumato.tools.rehearse_apart import rehearse_apart
from sfumato.track.guard import Guard

NEAR = 0.7  # share of the GPU's memory above which the bound says too little


def check_memory(config: Config, memory: int | None = None) -> None:
    """Raise UserError where the run cannot fit; a line on stderr where it may not.

    memory: of the GPU, in bytes; None: as CUDA says. Does nothing without a GPU, with --no_memory_check, and for faults
    that training itself reports. Of several processes, whose GPUs hold the same, the first one looks at the bound.
    """
    launch = read_launch()
    total = find_memory() if memory is None else memory
    if total is None or not config.memory.memory_check or launch.rank > 0:
        return
    bound = find_bound(config)
    if bound is None:
        return
    refuse_above(bound, total, "needs at least")
    if bound.size < NEAR * total or launch.processes > 1 or not is_supported():
        return
    peak = find_peak(config)
    if peak is not None:
        refuse_above(peak, total, "needs")
        warn_above(peak, total)


def find_memory() -> int | None:
    """Bytes of this process's GPU; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory


def find_bound(config: Config) -> MemoryBound | None:
    """From file headers; None where the configuration has a fault."""
    problems = Problems()
    with problems.catch():
        return bound_memory(plan_model(config, problems), torch.device("cuda"))
    return None


def refuse_above(peak: MemoryBound, total: int, verb: str) -> None:
    if peak.size > total:
        raise UserError(
            f"the GPU has {total / GB:.2f} GB, and this run {verb} {peak.size / GB:.2f} GB ({peak.stage})",
            code="run-exceeds-gpu",
            fix=f"`sfumato plan --fit {name_card(total)}` with the same options finds what fits; --no_memory_check "
            "starts the run nevertheless",
        )


def name_card(total: int) -> str:
    """The memory as --fit takes it, never more than there is."""
    return f"{math.floor(total / GIB * 10) / 10:g}GB"


def warn_above(peak: MemoryBound, total: int) -> None:
    if peak.size > total - ALLOWANCE:
        show(
            f"warning: of the GPU's {total / GB:.2f} GB this run needs {peak.size / GB:.2f} GB ({peak.stage}), and "
            f"CUDA itself, workspaces and fragmentation about {ALLOWANCE / GB:.2f} GB more: it may run out of memory "
            f"(`sfumato plan --fit {name_card(total)}` finds what fits)"
        )


def find_peak(config: Config) -> MemoryBound | None:
    """By a rehearsal, now or before; None where the configuration has a fault, or the rehearsal fails."""
    try:
        plan = make_run_plan(config, processes=1)
    except UserError:
        return None
    index = find_peak_index(plan, config)
    return load_peak(index) or rehearse_peak(config, index)


def rehearse_peak(config: Config, index: Index) -> MemoryBound | None:
    """Rehearse and remember; a fault of the rehearsal is no reason not to train."""
    show("rehearsing the memory of this run once, since it is near that of the GPU (--no_memory_check: not)")
    with Guard().survive("rehearsing the memory of this run"):
        largest = max(rehearse_apart(config, saves=False), key=lambda stage: stage.peak)
        return save_peak(index, MemoryBound(largest.name, largest.peak))
    return None


def show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
