"""A loss in one file: sqrt(d^2 + 0.001^2), nearly |d| but smooth at 0 (Charbonnier et al. 1994).

PYTHONPATH=examples/extend sfumato train --loss_type charbonnier_loss ...
"""

from __future__ import annotations

from torch import Tensor

from sfumato.config import LossOptions
from sfumato.diffusion.losses import LOSSES, Loss
from sfumato.diffusion.objective import Level

EPS = 1e-3


@LOSSES.register("charbonnier")
def charbonnier(options: LossOptions) -> Loss:
    """Elementwise; the level says how noisy each sample is, and is not needed here."""

    def loss(estimate: Tensor, target: Tensor, level: Level) -> Tensor:
        return ((estimate - target) ** 2 + EPS**2).sqrt()

    return loss
