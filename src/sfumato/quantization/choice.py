"""What the options about low precision mean: in which format a network's weights are kept while it is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch

from sfumato.config.memory import MemoryOptions
from sfumato.quantization.nf4 import NormalFloat4
from sfumato.quantization.rotation import LARGEST_GROUP
from sfumato.quantization.scaled_blocks import PlainFloat8, ScaledBlocks
from sfumato.quantization.weight_format import WeightFormat

FLOAT8 = torch.float8_e4m3fn
FLOAT8_BLOCK = 64  # columns with one scale
INT8_BLOCK = 128


def choose_denoiser_format(memory: MemoryOptions) -> WeightFormat | None:
    """None: that of the computation."""
    rotation = LARGEST_GROUP if memory.rotate_inputs else 0
    if memory.fp8_compute or memory.int8_compute:
        dtype = FLOAT8 if memory.fp8_compute else torch.int8
        return ScaledBlocks(dtype=dtype, rotation=rotation if memory.int8_compute else 0, computes=True)
    if memory.fp8_scaled:
        return ScaledBlocks(dtype=FLOAT8, block=FLOAT8_BLOCK)
    return _choose_base_format(memory, float8=memory.fp8_base or memory.fp8_base_unet, rotation=rotation)


def choose_text_format(memory: MemoryOptions) -> WeightFormat | None:
    """Text encoders are in float8 with --fp8_base alone: --fp8_base_unet means the denoiser and nothing else."""
    return _choose_base_format(memory, float8=memory.fp8_base and not memory.fp8_base_unet, rotation=0)


def choose_kept(stored: WeightFormat | None, wanted: WeightFormat | None) -> WeightFormat | None:
    """The format of a weight in memory. stored: its format in the file; wanted: by the options.

    What a file has in fewer bits stays as it is where no other format is wanted than plain float8, and where its
    numbers serve the products that are wanted.
    """
    if stored is None or wanted is None or isinstance(wanted, PlainFloat8):
        return stored or wanted
    if isinstance(stored, ScaledBlocks) and replace(stored, computes=True) == wanted:
        return replace(stored, computes=True)
    return wanted


def describe_precision(dtype: torch.dtype, format: WeightFormat | None) -> str:
    """How a network's weights are kept: "bfloat16", or "bfloat16, blocks in float8"."""
    name = str(dtype).removeprefix("torch.")
    return name if format is None else f"{name}, blocks in {format.label}"


def _choose_base_format(memory: MemoryOptions, *, float8: bool, rotation: int) -> WeightFormat | None:
    if memory.int8_base:
        return ScaledBlocks(dtype=torch.int8, block=INT8_BLOCK, rotation=rotation)
    if memory.nf4_base:
        return NormalFloat4()
    return PlainFloat8() if float8 else None
