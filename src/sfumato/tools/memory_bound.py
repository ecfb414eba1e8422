"""A lower bound of a run's peak memory on a GPU, from file headers alone: what exceeds a card by it never fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from sfumato.config import Config
from sfumato.families.part import Part
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
    """Of the step what is there at its end; of caching each network on its own. Activations count as nothing."""
    model = make_model(plan, device)
    sizes = {name: count_weight_bytes(part) for name, part in model.parts.items() if part.device == device}
    cached = plan.config.cache.list_cached_parts(plan.blueprint.text_parts, plan.method.live_text)
    step = sum(size for name, size in sizes.items() if name not in cached) + count_trained_bytes(plan)
    stages = [MemoryBound(STEP, step)]
    stages += [MemoryBound(f"caching of {name}", size) for name, size in sizes.items() if name in cached]
    return max(stages, key=lambda stage: stage.size)


def count_weight_bytes(part: Part) -> int:
    """Of a network's own weights on its device; those that share a tensor count once."""
    weights, known = part.network.weights, part.module.state_dict().keys()
    on_host, formats = tuple(f"{path}." for path in part.hosted_blocks), part.weight_formats
    size = 0
    for name, shape in weights.read_shapes().items():
        if name.startswith(on_host):
            continue
        if name in formats:
            size += formats[name].count_bytes(shape)
        elif name in known and name not in weights.tied:
            size += part.dtype.itemsize * shape.numel()
    return size


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
