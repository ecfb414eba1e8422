"""Rules between the options of memory and precision and others."""

from __future__ import annotations

from sfumato.config.rule import Rule

MEMORY_RULES = (
    Rule(
        name="attention-without-gradients",
        kind="conflict",
        options=("use_sage_attn",),
        broken=lambda c: c.memory.use_sage_attn,
        what="--use_sage_attn computes attention in eight bits and gives no gradients, so nothing would train",
        fix="leave it out; torch's own fast attention is always used",
    ),
    Rule(
        name="full-bf16-precision",
        kind="conflict",
        options=("full_bf16", "mixed_precision"),
        broken=lambda c: c.memory.full_bf16 and c.memory.mixed_precision != "bf16",
        what="--full_bf16 keeps weights in bfloat16, and the computation is not in bfloat16",
        fix="give --mixed_precision bf16",
    ),
    Rule(
        name="full-bf16-schedule-free",
        kind="conflict",
        options=("full_bf16", "optimizer_type"),
        broken=lambda c: c.memory.full_bf16 and c.optim.schedule_free,
        what="a schedule-free optimizer keeps its average in the weights themselves, and bfloat16 is too coarse for it",
        fix="leave --full_bf16 out, or give --optimizer_type AdamW",
    ),
    Rule(
        name="rounding-off",
        kind="no effect",
        options=("full_bf16", "stochastic_rounding"),
        broken=lambda c: not c.memory.full_bf16 and not c.memory.stochastic_rounding,
        what="--no_stochastic_rounding has no effect: weights that train are in float32",
        fix="leave it out, or give --full_bf16",
    ),
    Rule(
        name="full-bf16-by-chance",
        kind="note",
        options=("full_bf16", "stochastic_rounding"),
        broken=lambda c: c.memory.full_bf16 and c.memory.stochastic_rounding,
        what="weights and gradients are in bfloat16; each step is taken in float32 and rounded up or down by chance",
        fix="--no_stochastic_rounding rounds to the nearest, which loses steps below 1/512 of a weight",
    ),
    Rule(
        name="full-bf16-to-nearest",
        kind="note",
        options=("full_bf16", "stochastic_rounding"),
        broken=lambda c: c.memory.full_bf16 and not c.memory.stochastic_rounding,
        what="weights and gradients are in bfloat16, rounded to the nearest: steps below 1/512 of a weight are lost",
        fix="leave --no_stochastic_rounding out",
    ),
)
