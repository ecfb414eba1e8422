"""Optimizer steps that are skipped where loss or gradients are not finite, without waiting where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

DEVICES = {"cpu", "cuda", "xpu", "rehearsal"}  # whose kernels are known to do so


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether its kernels read `found_inf` themselves, which torch's GradScaler gives to fused optimizers.

    torch's fused SGD reads it, too, but after a first step that was skipped its momentum is uninitialised memory.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    devices: set[str] = set()
    for group in optimizer.param_groups:
        devices.update(parameter.device.type for parameter in group["params"])
    return devices <= DEVICES and all(group["fused"] for group in optimizer.param_groups)


def step_where(taken: Tensor, optimizer: Any, step: Callable[[], None]) -> None:
    """Let the optimizer take its step where `taken`, 0-d bool, holds; else weights and state stay as they are.

    With other optimizers than those of `skips_on_device` the host has to know: it waits once for the device.
    """
    if not skips_on_device(optimizer):
        if taken:
            step()
        return
    optimizer.found_inf = (~taken).float()
    try:
        step()
    finally:
        del optimizer.found_inf
