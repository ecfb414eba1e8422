"""The repeated blocks of a run's networks: which of them stay in main memory, and how they are wrapped."""

from __future__ import annotations

from functools import partial

from torch import nn

from sfumato.config import MemoryOptions
from sfumato.families.base import Family
from sfumato.families.part import Part, WeightChange
from sfumato.memory.blocks import WrappedBlocks, wrap_blocks
from sfumato.memory.offload import choose_hosted_blocks
from sfumato.methods.model_plan import ModelPlan
from sfumato.plan import RunPlan


def choose_hosted_parts(plan: RunPlan | ModelPlan, model: Family) -> None:
    """Choose the blocks that stay in main memory: of the denoiser, and of the encoders that only fill a cache.

    No weight is read yet. Blocks of such an encoder are wrapped whenever it is loaded, those of the denoiser when all
    that belongs to them is there.
    """
    memory, cache = plan.config.memory, plan.config.cache
    cached = set(cache.list_cached_parts(plan.blueprint.text_parts, plan.method.live_text)) - {"vae"}
    host_blocks(model.parts["denoiser"], memory.swapped_blocks)
    for name in cached if memory.text_encoder_blocks_to_swap else ():
        part = model.parts[name]
        host_blocks(part, memory.text_encoder_blocks_to_swap or 0)
        part.add_change(WeightChange(identity="", apply=partial(wrap_for_caching, part)))


def host_blocks(part: Part, units: int) -> None:
    part.hosted_blocks = choose_hosted_blocks(part.module, part.spec.blocks, units)


def wrap_for_caching(part: Part, module: nn.Module) -> None:
    wrap_part(part, MemoryOptions())


def wrap_part(part: Part, memory: MemoryOptions) -> WrappedBlocks:
    """Wrap a loaded network's blocks, as the options say and where they are."""
    return wrap_blocks(part.module, part.spec.blocks, memory, device=part.device, hosted=part.hosted_blocks)
