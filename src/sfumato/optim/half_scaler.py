"""The loss scale of runs whose gradients are in float16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer


def make_scaler(device: torch.device, *, mixed: bool, full: bool) -> GradScaler:
    """mixed: --mixed_precision fp16; without it a scaler does nothing. full: --full_fp16."""
    return HalfGradScaler(device.type) if full else GradScaler(device.type, enabled=mixed)


def list_infinities(scaler: GradScaler, optimizer: Optimizer) -> list[Tensor]:
    """What the scaler has found of this optimizer's gradients, 0-d each: above 0 where one is not finite."""
    return list(scaler._found_inf_per_device(optimizer).values()) if scaler.is_enabled() else []


class HalfGradScaler(GradScaler):
    """Leaves the gradients scaled and only looks whether they are finite: unscaled in float16, those below 6e-8 would
    be 0. Who reads them divides by `read_scale`, in float32.
    """

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, torch.ones_like(inv_scale), found_inf, allow_fp16=True)

    def read_scale(self) -> Tensor:
        """0-d, on the device."""
        assert self._scale is not None, "a loss was scaled before"
        return self._scale
