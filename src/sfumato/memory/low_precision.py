"""Which networks of a model keep their weights in fewer bits, and in which format."""

from __future__ import annotations

from collections.abc import Collection

import torch

from sfumato.config.memory import MemoryOptions
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.quantization.choice import choose_denoiser_format, choose_text_format
from sfumato.quantization.weight_format import WeightFormat

FLOAT8_PRODUCTS = (8, 9)  # the first CUDA capability with them


def choose_formats(model: Family, memory: MemoryOptions, *, trained: Collection[str] = ()) -> None:
    """Set in which format each network keeps its weights. trained: networks whose own weights train."""
    if memory.fp8_compute and model.device.type == "cuda":
        check_float8_products(torch.cuda.get_device_capability(model.device))
    for name, part in model.parts.items():
        part.keeps_stored = name not in trained
        part.format = choose_format(name, memory, model.text_parts)


def check_float8_products(capability: tuple[int, int]) -> None:
    """Raise UserError for a GPU without them. capability: CUDA's, of the GPU."""
    if capability < FLOAT8_PRODUCTS:
        raise UserError(
            "--fp8_compute: this GPU cannot multiply in float8, which GPUs since Ada Lovelace and Hopper can",
            code="float8-products-unsupported",
            fix="--int8_compute, or --fp8_scaled, which keeps weights in float8 and multiplies as before",
        )


def choose_format(part: str, memory: MemoryOptions, text_parts: Collection[str]) -> WeightFormat | None:
    """What the options ask of a frozen network; the autoencoder is never in fewer bits."""
    if part == "vae":
        return None
    return choose_text_format(memory) if part in text_parts else choose_denoiser_format(memory)
