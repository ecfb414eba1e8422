"""Memory measures: what a run can do to fit a smaller card, each with the options that it sets and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.common.registry import Registry
from sfumato.config import Config
from sfumato.config.precision_rules import LOW_PRECISION

Values = Mapping[str, Any]  # option -> value


@dataclass(frozen=True, kw_only=True)
class MemoryMeasure:
    """One row of the table."""

    time: float  # what each level adds to the time of a step, as a share of it; rough, it orders the trials
    cost: str  # the same in words, for the user
    list_levels: Callable[[Config], Sequence[Values]]  # what each level sets, mildest first; empty: nothing to set
    changes_weights_alone: bool = False  # whether activations stay as large as they are


HOSTED_BLOCKS = (10, 20, 30, 64)  # levels of --blocks_to_swap
MEASURES: Registry[MemoryMeasure] = Registry("memory measure")


def list_smaller_batches(config: Config) -> list[Values]:
    """Every divisor of the batch size below it, with so much more accumulation that a step has as many samples."""
    size, accumulation = config.buckets.train_batch_size, config.loop.gradient_accumulation_steps
    return [
        {"train_batch_size": part, "gradient_accumulation_steps": accumulation * size // part}
        for part in range(size - 1, 0, -1)
        if size % part == 0
    ]


def list_more_hosted_blocks(config: Config) -> list[Values]:
    """More blocks than are in main memory already; the last level is all blocks of every published model."""
    fused = {"fused_backward_pass": True} if config.run.method == "full" and not config.optim.fuses_backward else {}
    return [{"blocks_to_swap": count, **fused} for count in HOSTED_BLOCKS if count > config.memory.swapped_blocks]


def offer(values: Values, when: Callable[[Config], bool]) -> Callable[[Config], Sequence[Values]]:
    """One level that sets these values, where the configuration is as `when` says."""
    return lambda config: [values] if when(config) else []


MEASURES.register("cached latents")(
    MemoryMeasure(
        time=-0.1,
        cost="saves time, too; room on the disk of --cache_dir",
        list_levels=offer(
            {"cache_latents": True, "cache_latents_to_disk": True}, when=lambda c: not c.cache.cache_latents
        ),
    )
)
MEASURES.register("cached text")(
    MemoryMeasure(
        time=-0.1,
        cost="saves time, too; room on the disk of --cache_dir",
        list_levels=offer(
            {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True},
            when=lambda c: not c.cache.cache_text_encoder_outputs,
        ),
    )
)
MEASURES.register("images encoded one at a time")(
    MemoryMeasure(
        time=0.0,
        cost="time before the first step alone",
        list_levels=offer({"vae_batch_size": 1}, when=lambda c: c.cache.vae_batch_size > 1),
    )
)
MEASURES.register("captions encoded one at a time")(
    MemoryMeasure(
        time=0.0,
        cost="time before the first step alone",
        list_levels=offer({"text_encoder_batch_size": None}, when=lambda c: (c.cache.text_encoder_batch_size or 1) > 1),
    )
)
MEASURES.register("text encoders' blocks in main memory")(
    MemoryMeasure(
        time=0.0,
        cost="time of encoding captions alone, where they are cached",
        list_levels=offer(
            {"text_encoder_blocks_to_swap": HOSTED_BLOCKS[-1]},
            when=lambda c: c.memory.text_encoder_blocks_to_swap is None,
        ),
    )
)
MEASURES.register("previews one at a time")(
    MemoryMeasure(
        time=0.0,
        cost="time of previews alone",
        list_levels=offer({"sample_batch_size": None}, when=lambda c: (c.samples.sample_batch_size or 1) > 1),
    )
)
# Faster on most GPUs; its time counts as 0, so that what rounds is chosen only where it is needed.
MEASURES.register("bfloat16")(
    MemoryMeasure(
        time=0.0,
        cost="frozen weights and the computation are rounded to 8 bits of precision; faster on most GPUs",
        list_levels=offer({"mixed_precision": "bf16"}, when=lambda c: c.memory.mixed_precision == "no"),
    )
)
MEASURES.register("trained weights in bfloat16")(
    MemoryMeasure(
        time=0.05,
        cost="trained weights are rounded to 8 bits of precision, stochastically",
        list_levels=offer(
            {"mixed_precision": "bf16", "full_bf16": True},
            when=lambda c: (
                c.run.method == "full" and c.memory.mixed_precision != "fp16" and c.memory.trained_precision == "no"
            ),
        ),
    )
)
MEASURES.register("EMA on the CPU")(
    MemoryMeasure(
        time=0.05,
        cost="a copy of the trained weights to the CPU in every step",
        list_levels=offer({"ema_on_cpu": True}, when=lambda c: c.ema.ema_count > 0 and not c.ema.ema_on_cpu),
    )
)
MEASURES.register("smaller batches")(
    MemoryMeasure(
        time=0.05,
        cost="some speed; a step has as many images as before, by accumulation",
        list_levels=list_smaller_batches,
    )
)
MEASURES.register("fused backward pass")(
    MemoryMeasure(
        time=0.05,
        cost="each gradient is clipped by its own norm",
        list_levels=offer(
            {"fused_backward_pass": True}, when=lambda c: c.run.method == "full" and not c.optim.fuses_backward
        ),
    )
)
MEASURES.register("blocks in main memory")(
    MemoryMeasure(
        time=0.15,
        cost="weights are copied to the device in every step, beside what computes; room in main memory",
        list_levels=list_more_hosted_blocks,
    )
)
MEASURES.register("gradient checkpointing")(
    MemoryMeasure(
        time=0.3,
        cost="a second forward, about a third of a step's time",
        list_levels=offer({"gradient_checkpointing": True}, when=lambda c: not c.memory.gradient_checkpointing),
    )
)
MEASURES.register("inputs of blocks in main memory")(
    MemoryMeasure(
        time=0.4,
        cost="a second forward, and copies beside the computation",
        list_levels=offer({"cpu_offload_checkpointing": True}, when=lambda c: not c.memory.cpu_offload_checkpointing),
    )
)


def list_smaller_formats(config: Config) -> list[Values]:
    """Formats with fewer bits for the frozen denoiser's weights, where they are in none yet."""
    is_settled = config.run.method == "full" or any(config.value(name) for name in LOW_PRECISION)
    return [] if is_settled else [{"fp8_scaled": True}, {"nf4_base": True}]


# Its time counts as more than it takes, so that what rounds comes after what gives the same numbers.
MEASURES.register("weights in fewer bits")(
    MemoryMeasure(
        time=0.35,
        cost="the frozen denoiser's weights are rounded, in nf4 visibly, and decoded each time that they are used",
        list_levels=list_smaller_formats,
        changes_weights_alone=True,
    )
)
