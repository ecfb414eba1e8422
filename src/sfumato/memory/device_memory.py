"""What a GPU says of its memory; nothing is known of other devices."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FreeMemory(NamedTuple):
    """Of a device, in bytes; what other programs use is not free."""

    free: int
    total: int


def take_peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors took since the last call; None where that is not counted."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def read_free_memory(device: torch.device) -> FreeMemory | None:
    """None where the device does not say."""
    return FreeMemory(*torch.cuda.mem_get_info(device)) if device.type == "cuda" else None
