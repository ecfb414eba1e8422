"""Options that trade memory for time and precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from sfumato.config.base import Options, option

Backend = Annotated[str, BeforeValidator(lambda value: "inductor" if value == "no" else value)]  # of front ends
Dynamic = Annotated[
    Literal["true", "false", "auto"],
    BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool | str) else value),
]
SPLIT_MODE_BLOCKS = 18  # that sd-scripts swaps with it
TORCH_ATTENTION = "torch's scaled dot product attention needs no more memory"


class MemoryOptions(Options):
    """Memory and precision"""

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "precision of the computation")
    gradient_checkpointing: bool = option(False, "gradient checkpointing: less memory, more time")
    memory_check: bool = option(
        True, "refuse a run that cannot fit the GPU that is there; --no_memory_check starts it nevertheless"
    )
    attention: Literal["sdpa", "cudnn", "math", "flash", "flash_3", "xformers", "sage"] | None = option(
        None, "kernel of the denoiser's attention: one of torch's or of an installed package; default: sdpa"
    )
    sdpa: bool = option(False, "torch's scaled dot product attention", no_effect="it is the default")
    xformers: bool = option(False, "same as --attention xformers, where that can be had")
    diffusers_xformers: bool = option(False, "same as --xformers")
    mem_eff_attn: bool = option(False, "memory-efficient (sliced) attention", no_effect=TORCH_ATTENTION)
    use_flash_attn: bool = option(False, "same as --attention flash, where that can be had")
    use_sage_attn: bool = option(False, "sageattention; refused, because it has no gradients")
    full_fp16: bool = option(
        False, "trained weights and their gradients in float16, too; bfloat16 has its range without a loss scale"
    )
    full_bf16: bool = option(False, "trained weights and their gradients in bfloat16, too")
    stochastic_rounding: bool = option(
        True, "stochastic rounding of bfloat16 and float16 weights, so that small steps are not lost"
    )
    fp8_base: bool = option(False, "keep the weights of the frozen denoiser and text encoders in float8")
    fp8_base_unet: bool = option(False, "keep those of the frozen denoiser alone in float8")
    fp8_scaled: bool = option(
        False, "keep those of the frozen denoiser in float8 with a scale for each 64 input channels: more precise"
    )
    int8_base: bool = option(False, "keep the weights of the frozen denoiser and text encoders in int8, with scales")
    nf4_base: bool = option(False, "keep them in nf4, four bits each: the least memory, and the least precise")
    fp8_compute: bool = option(
        False,
        "multiply in float8: the frozen denoiser's weights, its inputs and gradients are rounded to it",
    )
    int8_compute: bool = option(False, "multiply in int8, in the same way")
    rotate_inputs: bool = option(
        False, "rotate input channels before they are rounded to int8: less is lost where few of them are large"
    )
    blocks_to_swap: int | None = option(
        None,
        "blocks of the denoiser whose weights stay in main memory until they are needed, counted in its largest block",
        ge=1,
    )
    stream_blocks: bool = option(
        False, "read these blocks from the mapped checkpoint each time: little main memory, but slower copies"
    )
    text_encoder_blocks_to_swap: int | None = option(
        None, "the same for each text encoder while its features are cached", ge=1
    )
    double_blocks_to_swap: int | None = option(
        None, "deprecated: as --blocks_to_swap, added to half of --single_blocks_to_swap", ge=0
    )
    single_blocks_to_swap: int | None = option(None, "deprecated: as half as many --blocks_to_swap", ge=0)
    split_mode: bool = option(False, "deprecated: same as --blocks_to_swap 18")
    checkpoint_every: int | None = option(
        None, "gradient checkpointing of every N-th block alone: between all and none in memory and time", ge=1
    )
    cpu_offload_checkpointing: bool = option(
        False, "gradient checkpointing whose inputs of blocks wait in main memory; enables --gradient_checkpointing"
    )
    highvram: bool = option(
        False, "do not empty the device's cache while encoding", no_effect="it is never emptied while encoding"
    )
    compile: bool = option(False, "compile the repeated blocks with torch.compile: faster after the first steps")
    compile_backend: Backend = option("inductor", "what compiles: inductor, or another backend of torch")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = option(
        "default", "how hard inductor tries"
    )
    compile_dynamic: Dynamic = option(
        "auto", "whether one compiled graph serves images of all sizes; auto: from the second size on"
    )
    compile_fullgraph: bool = option(False, "fail where a block cannot be compiled whole, instead of compiling parts")
    compile_cache_size_limit: int | None = option(
        None, "graphs for one class of blocks, after which it is not compiled; default: 8 for each block", ge=1
    )

    @property
    def trained_precision(self) -> Literal["no", "bf16", "fp16"]:
        """Of trained weights and their gradients; no: float32."""
        return "bf16" if self.full_bf16 else "fp16" if self.full_fp16 else "no"

    @property
    def wanted_attention(self) -> str:
        """By --attention or an older switch, of which xformers' comes first as in sd-scripts."""
        if self.attention is not None:
            return self.attention
        if self.xformers or self.diffusers_xformers:
            return "xformers"
        return "flash" if self.use_flash_attn else "sdpa"

    @property
    def checkpoint_interval(self) -> int:
        """Every how many blocks one is recomputed in backward; 0 for none."""
        return self.checkpoint_every or int(self.gradient_checkpointing or self.cpu_offload_checkpointing)

    @property
    def swapped_blocks(self) -> int:
        """Of the largest size; 0 for none."""
        older = (self.double_blocks_to_swap or 0) + ((self.single_blocks_to_swap or 0) + 1) // 2
        return self.blocks_to_swap or older or (SPLIT_MODE_BLOCKS if self.split_mode else 0)
