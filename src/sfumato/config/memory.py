"""Options that trade memory for time and precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from sfumato.config.base import Options, option

Backend = Annotated[
    Literal[
        "eager",
        "aot_eager",
        "inductor",
        "aot_ts_nvfuser",
        "nvprims_nvfuser",
        "cudagraphs",
        "ofi",
        "fx2trt",
        "onnxrt",
        "tensort",
        "ipex",
        "tvm",
    ],
    BeforeValidator(lambda value: "inductor" if value == "no" else value),  # front ends write no for not compiling
]
OWN_ATTENTION = "torch's own attention is always used, which takes no more memory"


class MemoryOptions(Options):
    """Memory and precision"""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "precision of the computation")
    gradient_checkpointing: bool = option(False, "compute activations twice: less memory, more time")
    sdpa: bool = option(False, "torch's own fast attention", no_effect="it is always used")
    xformers: bool = option(False, "attention from xformers", no_effect=OWN_ATTENTION)
    diffusers_xformers: bool = option(False, "attention from xformers, by diffusers' switch", no_effect=OWN_ATTENTION)
    mem_eff_attn: bool = option(False, "attention in slices", no_effect=OWN_ATTENTION)
    use_flash_attn: bool = option(
        False, "attention from flash-attn", no_effect="torch's own attention takes such kernels where it can"
    )
    use_sage_attn: bool = option(False, "attention from sageattention; refused, for it gives no gradients")
    full_fp16: bool = option(
        False, "weights and gradients in float16, too",
        planned="the memory options; --full_bf16 keeps them in bfloat16",
    )  # fmt: skip
    full_bf16: bool = option(False, "weights that train and their gradients in bfloat16, too")
    stochastic_rounding: bool = option(
        True, "round them up or down by chance after a step, so that small steps count on average"
    )
    fp8_base: bool = option(False, "keep the frozen model in float8", planned="fp8 weights")
    fp8_base_unet: bool = option(False, "keep the frozen denoiser in float8", planned="fp8 weights")
    blocks_to_swap: int | None = option(
        None, "blocks that wait in main memory until they are needed", planned="block swap", ge=1
    )
    double_blocks_to_swap: int | None = option(
        None, "old way to say how many double blocks wait in main memory", planned="block swap", ge=0
    )
    single_blocks_to_swap: int | None = option(
        None, "old way to say how many single blocks wait in main memory", planned="block swap", ge=0
    )
    split_mode: bool = option(False, "old way to swap 18 blocks", planned="block swap")
    cpu_offload_checkpointing: bool = option(
        False, "keep checkpointed activations in main memory", planned="block swap"
    )
    highvram: bool = option(
        False, "do not empty the device's cache while encoding", no_effect="it is never emptied while encoding"
    )
    torch_compile: bool = option(False, "compile the model", planned="compiling")
    dynamo_backend: Backend = option("inductor", "compiler that --torch_compile uses", planned="compiling")
