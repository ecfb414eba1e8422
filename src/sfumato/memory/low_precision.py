"""Which networks of a model keep their weights in fewer bits, and in which format."""

from __future__ import annotations

from collections.abc import Collection

from sfumato.config.memory import MemoryOptions
from sfumato.families.base import Family
from sfumato.quantization.choice import choose_denoiser_format, choose_text_format
from sfumato.quantization.weight_format import WeightFormat


def choose_formats(model: Family, memory: MemoryOptions, *, trained: Collection[str] = ()) -> None:
    """Set in which format each network keeps its weights. trained: networks whose own weights train."""
    for name, part in model.parts.items():
        part.keeps_stored = name not in trained
        part.format = choose_format(name, memory, model.text_parts)


def choose_format(part: str, memory: MemoryOptions, text_parts: Collection[str]) -> WeightFormat | None:
    """What the options ask of a frozen network; the autoencoder is never in fewer bits."""
    if part == "vae":
        return None
    return choose_text_format(memory) if part in text_parts else choose_denoiser_format(memory)
