"""Rules between the options of low precision, i.e. weights in fewer bits and products in 8 bits, and of attention."""

from __future__ import annotations

from sfumato.config.option_rule import OptionRule
from sfumato.config.schema import Config

FLOAT8_OPTIONS = ("fp8_base", "fp8_base_unet", "fp8_scaled", "fp8_compute")
INT8_OPTIONS = ("int8_base", "int8_compute")
LOW_PRECISION = (*FLOAT8_OPTIONS, *INT8_OPTIONS, "nf4_base")
ATTENTION_SWITCHES = ("xformers", "diffusers_xformers", "use_flash_attn")
DENOISER_ALONE = ("fp8_base_unet", "fp8_scaled", "fp8_compute", "int8_compute", "rotate_inputs")


def list_number_kinds(config: Config) -> list[str]:
    """Of float8, int8 and nf4 those that the options ask for."""
    kinds = {"float8": FLOAT8_OPTIONS, "int8": INT8_OPTIONS, "nf4": ("nf4_base",)}
    return [kind for kind, names in kinds.items() if any(config.value(name) for name in names)]


PRECISION_RULES = (
    OptionRule(
        code="base-formats-conflict",
        severity="conflict",
        options=LOW_PRECISION,
        is_broken=lambda c: len(list_number_kinds(c)) > 1,
        what="the --fp8_..., --int8_... and --nf4_base options keep the same weights in different formats",
        fix="give those of one format",
    ),
    OptionRule(
        code="scaled-format-with-compute",
        severity="no effect",
        options=("fp8_scaled", "fp8_compute"),
        is_broken=lambda c: c.memory.fp8_scaled and c.memory.fp8_compute,
        what="--fp8_scaled",
        reason="with --fp8_compute each output channel has one scale, which its products need",
        fix="remove it",
    ),
    OptionRule(
        code="rotation-without-int8",
        severity="no effect",
        options=("rotate_inputs", *LOW_PRECISION),
        is_broken=lambda c: c.memory.rotate_inputs and not (c.memory.int8_base or c.memory.int8_compute),
        what="--rotate_inputs",
        reason="it belongs to --int8_compute and --int8_base; float8 and nf4 have finer steps for small numbers",
        fix="give one of them, or remove it",
    ),
    OptionRule(
        code="low-precision-in-full-training",
        severity="conflict",
        options=("method", *DENOISER_ALONE),
        is_broken=lambda c: c.run.method == "full" and any(c.value(name) for name in DENOISER_ALONE),
        what="--fp8_base_unet, --fp8_scaled, --fp8_compute, --int8_compute and --rotate_inputs are for a frozen "
        "denoiser, but --method full trains it",
        fix="remove them; --full_bf16 halves its weights, and --fp8_base is for the text encoders",
    ),
    OptionRule(
        code="sage-attention-without-gradients",
        severity="conflict",
        options=("attention", "use_sage_attn"),
        is_broken=lambda c: c.memory.use_sage_attn or c.memory.attention == "sage",
        what="sageattention computes attention in 8 bits and has no gradients, so nothing would train",
        fix="remove it; --attention sdpa is the default",
    ),
    OptionRule(
        code="attention-takes-precedence",
        severity="no effect",
        options=("attention", *ATTENTION_SWITCHES),
        is_broken=lambda c: c.memory.attention is not None and any(c.value(name) for name in ATTENTION_SWITCHES),
        what="--xformers, --diffusers_xformers and --use_flash_attn",
        reason="--attention takes precedence",
        fix="remove them",
    ),
    OptionRule(
        code="full-fp16-without-fp16-precision",
        severity="conflict",
        options=("full_fp16", "mixed_precision"),
        is_broken=lambda c: c.memory.full_fp16 and c.memory.mixed_precision != "fp16",
        what="--full_fp16 keeps weights in float16, but the computation is not in float16",
        fix="give --mixed_precision fp16",
    ),
    OptionRule(
        code="full-fp16-with-ggpo",
        severity="conflict",
        options=("full_fp16", "network_args"),
        is_broken=lambda c: c.memory.full_fp16 and any(name.startswith("ggpo_") for name in c.network.network_args),
        what="--network_args ggpo_sigma and ggpo_beta measure gradients after a step, which --full_fp16 keeps "
        "multiplied with the loss scale",
        fix="give --full_bf16 and --mixed_precision bf16, or remove ggpo_sigma and ggpo_beta",
    ),
    OptionRule(
        code="full-fp16-rounding",
        severity="note",
        options=("full_fp16", "stochastic_rounding"),
        is_broken=lambda c: c.memory.full_fp16,
        what="weights and gradients are in float16; each step is computed in float32 and rounded, and gradients beyond "
        "65504 after the loss scale skip it",
        fix="--full_bf16 with --mixed_precision bf16 has no such limit",
    ),
)
