"""Elementwise losses: (estimate, target, level) -> a tensor of the same shape."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sfumato.diffusion.objective import Level
from sfumato.registry import Registry

Loss = Callable[[Tensor, Tensor, Level], Tensor]
LOSSES: Registry[Loss] = Registry("loss type")


@LOSSES.register("l2")
def l2(estimate: Tensor, target: Tensor, level: Level) -> Tensor:
    return (estimate - target) ** 2
