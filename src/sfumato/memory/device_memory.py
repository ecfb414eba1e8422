"""What a GPU says of its memory; nothing is known of other devices."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FreeMemory(NamedTuple):
    """Of a device, in bytes; what other programs use is not free."""

    free: int
    total: int


def read_peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors took, since `forget_peak_memory`; None where that is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def forget_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_free_memory(device: torch.device) -> FreeMemory | None:
    """None where the device does not say."""
    return FreeMemory(*torch.cuda.mem_get_info(device)) if device.type == "cuda" else None
