"""The repeated blocks of a run's networks: which of them stay in main memory, and how they are wrapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.optim import Optimizer

from sfumato.config import MemoryOptions, OptimOptions
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.part import Part, WeightChange
from sfumato.memory.attention import choose_attention, wrap_attention
from sfumato.memory.blocks import WrappedBlocks, wrap_blocks
from sfumato.memory.fused_backward import FusedBackward, divide
from sfumato.memory.offload import BlockOffload, choose_hosted_blocks, find_blocks
from sfumato.methods.model_plan import ModelPlan
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.half_stepper import HalfStepper
from sfumato.plan import RunPlan
from sfumato.quantization.choice import describe_precision


@dataclass(frozen=True, kw_only=True)
class PreparedNetworks:
    """What a run trains, and the blocks of the networks that its steps run."""

    groups: Sequence[ParameterGroup]
    blocks: Sequence[nn.Module]
    offload: BlockOffload | None  # of the blocks in main memory


def choose_hosted_parts(plan: RunPlan | ModelPlan, model: Family) -> None:
    """Choose the blocks that stay in main memory: of the denoiser, and of the encoders that only fill a cache.

    No weight is read yet. Blocks of such an encoder are wrapped whenever it is loaded, those of the denoiser when all
    that belongs to them is there.
    """
    memory, cache = plan.config.memory, plan.config.cache
    cached = set(cache.list_cached_parts(plan.blueprint.text_parts, plan.method.live_text)) - {"vae"}
    denoiser = model.parts["denoiser"]
    host_blocks(denoiser, memory.swapped_blocks)
    if memory.stream_blocks and denoiser.hosted_blocks:
        denoiser.streams_blocks = denoiser.can_stream_blocks()
        if not denoiser.streams_blocks:
            raise make_streaming_error(denoiser)
    for name in cached if memory.text_encoder_blocks_to_swap else ():
        part = model.parts[name]
        host_blocks(part, memory.text_encoder_blocks_to_swap or 0)
        part.add_change(WeightChange(identity="", apply=partial(wrap_for_caching, part)))


def make_streaming_error(part: Part) -> UserError:
    return UserError(
        f"--stream_blocks: the weights of {part.network.weights.file.header.path} are not stored in "
        f"{describe_precision(part.dtype, part.format)}, in which they are computed with",
        code="blocks-not-streamable",
        fix="`sfumato model convert --save_precision bf16` writes a safetensors file for --mixed_precision bf16",
    )


def host_blocks(part: Part, units: int) -> None:
    part.hosted_blocks = choose_hosted_blocks(part.module, part.spec.blocks, units)


def wrap_for_caching(part: Part, module: nn.Module) -> None:
    wrap_part(part, MemoryOptions())


def wrap_part(part: Part, memory: MemoryOptions) -> WrappedBlocks:
    """Wrap a loaded network's blocks, as the options say and where they are."""
    return wrap_blocks(part.module, part.spec.blocks, memory, device=part.device, hosted=part.hosted_blocks)


def prepare_blocks(
    parts: Sequence[Part], groups: Sequence[ParameterGroup], memory: MemoryOptions, *, masks_attention: bool
) -> PreparedNetworks:
    """Wrap the attention and the blocks of networks that are loaded and prepared by the method."""
    blocks: list[nn.Module] = []
    offload = None
    attention = choose_attention(memory, masked=masks_attention)
    for part in parts:
        if part.spec.blocks:  # all but the autoencoder, whose only head is larger than what kernels take
            wrap_attention(part.module, attention)
        wrapped = wrap_part(part, memory)
        blocks += find_blocks(part.module, part.spec.blocks).values()
        offload = wrapped.offload or offload
    return PreparedNetworks(groups=groups, blocks=blocks, offload=offload)


def make_fused_backward(
    optim: OptimOptions, optimizer: Optimizer, networks: PreparedNetworks, stepper: HalfStepper | None
) -> FusedBackward | None:
    """None where the optimizer steps after backward."""
    if not optim.fuses_backward:
        return None
    return FusedBackward(
        optimizer,
        list(list_step_buckets(optim, optimizer, networks)),
        stepper=stepper,
        offload=networks.offload,
        max_norm=optim.max_grad_norm,
    )


def list_step_buckets(
    optim: OptimOptions, optimizer: Optimizer, networks: PreparedNetworks
) -> Iterator[Sequence[nn.Parameter]]:
    """Parameters that step together. Those in main memory step alone, while their block is on the device."""
    hosted = {} if networks.offload is None else networks.offload.stand_ins
    parameters: list[nn.Parameter] = [each for group in optimizer.param_groups for each in group["params"]]
    yield from ([parameter] for parameter in parameters if parameter in hosted)
    others = [parameter for parameter in parameters if parameter not in hosted]
    if optim.fused_optimizer_groups is not None:
        yield from divide(others, optim.fused_optimizer_groups)
        return
    left = dict.fromkeys(others)
    for block in networks.blocks if optim.blockwise_fused_optimizers else ():
        own = [parameter for parameter in block.parameters() if parameter in left]
        for parameter in own:
            del left[parameter]
        yield from [own] if own else []
    yield from ([parameter] for parameter in left)
