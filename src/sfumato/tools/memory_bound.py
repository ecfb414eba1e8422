"""A lower bound of a run's peak memory on a GPU, from file headers alone: what exceeds a card by it never fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from sfumato.config import Config
from sfumato.families.part import Part
from sfumato.memory.offload import SLOTS
from sfumato.methods.model_plan import ModelPlan
from sfumato.tools.rehearsal_stages import STEP
from sfumato.training.model_setup import make_model

MOMENTS = {"adamw": 2}  # float32 numbers that an optimizer keeps for each trained one; 0: it may keep nothing
FLOAT32_BYTES = 4


class MemoryBound(NamedTuple):
    """The stage with the largest bound."""

    stage: str
    size: int  # bytes


def bound_memory(plan: ModelPlan, device: torch.device) -> MemoryBound:
    """The largest of `bound_stages`."""
    return max(bound_stages(plan, device), key=lambda stage: stage.size)


def bound_stages(plan: ModelPlan, device: torch.device) -> list[MemoryBound]:
    """Of the step, which comes first, what is there at its end; of caching each network on its own.

    Activations count as nothing.
    """
    model = make_model(plan, device)
    parts = {name: part for name, part in model.parts.items() if part.device == device}
    sizes = {name: count_weight_bytes(part) + count_slot_bytes(part) for name, part in parts.items()}
    cached = plan.config.cache.list_cached_parts(plan.blueprint.text_parts, plan.method.live_text)
    step = sum(size for name, size in sizes.items() if name not in cached) + count_trained_bytes(plan)
    caching = [MemoryBound(f"caching of {name}", size) for name, size in sizes.items() if name in cached]
    return [MemoryBound(STEP, step), *caching]


def count_weight_bytes(part: Part) -> int:
    """Of a network's own weights on its device; those that share a tensor count once."""
    on_host = tuple(f"{path}." for path in part.hosted_blocks)
    return sum(size for name, size in list_weight_bytes(part) if not name.startswith(on_host))


def count_slot_bytes(part: Part) -> int:
    """Of the slots on the device that its blocks in main memory visit."""
    if not part.hosted_blocks:
        return 0
    weights = list(list_weight_bytes(part))
    blocks = (f"{path}." for path in part.hosted_blocks)
    largest = max(sum(size for name, size in weights if name.startswith(block)) for block in blocks)
    return min(SLOTS, len(part.hosted_blocks)) * largest


def list_weight_bytes(part: Part) -> Iterator[tuple[str, int]]:
    """Name and bytes of a network's own weights, as they are kept; of those that share a tensor one."""
    weights, known, formats = part.network.weights, part.module.state_dict().keys(), part.weight_formats
    for name, shape in weights.read_shapes().items():
        if name in formats:
            yield name, formats[name].count_bytes(shape)
        elif name in known and name not in weights.tied:
            yield name, part.dtype.itemsize * shape.numel()


def count_trained_bytes(plan: ModelPlan) -> int:
    """Gradients, the optimizer's state, EMAs, and trained weights that are not the networks' own."""
    own = FLOAT32_BYTES if plan.config.memory.trained_precision == "no" else torch.bfloat16.itemsize
    added = 0 if plan.method.full_precision_parts(plan.blueprint) else own
    gradient = 0 if plan.config.optim.fuses_backward else own
    return sum(part.parameters for part in plan.parts) * (gradient + added + sum(count_kept_bytes(plan.config)))


def count_kept_bytes(config: Config) -> Iterator[int]:
    """What is kept for each trained number from step to step."""
    yield FLOAT32_BYTES * MOMENTS.get(config.optim.optimizer.lower(), 0)
    yield 0 if config.ema.ema_on_cpu else FLOAT32_BYTES * config.ema.ema_count
