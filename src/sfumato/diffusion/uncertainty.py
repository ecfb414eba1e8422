"""A learned weight of the loss over noise levels (Karras et al. 2024, "Analyzing and Improving the Training Dynamics
of Diffusion Models", sec. 2 and appendix B; after Kendall et al. 2018).

Each loss L at noise level sigma becomes L / e^u(sigma) + u(sigma). The minimizing u is the logarithm of the mean loss
at sigma, so all noise levels contribute equally to the gradient, also while the loss falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from sfumato.config import LossOptions
from sfumato.diffusion.objective import Level
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.weightings import clamp_snr
from sfumato.errors import UserError

CHANNELS = 128
UNCERTAINTY_GROUP = "uncertainty"  # the name of its parameter group


def make_uncertainty(loss: LossOptions, seed: int, device: torch.device) -> Uncertainty | None:
    """None without --uncertainty_weighting."""
    return Uncertainty(Randomness(seed).generator(UNCERTAINTY_GROUP)).to(device) if loss.uncertainty_weighting else None


def resume_uncertainty(uncertainty: Uncertainty | None, saved: Mapping[str, Tensor]) -> None:
    """Load the saved weights; UserError where only one of the two runs has them."""
    if bool(saved) != (uncertainty is not None):
        had, advice = ("with", "add") if saved else ("without", "remove")
        raise UserError(
            f"the state was saved {had} --uncertainty_weighting",
            code="resume-uncertainty-mismatch",
            fix=f"{advice} --uncertainty_weighting, or start without --resume",
        )
    if uncertainty is not None:
        uncertainty.load_state_dict(dict(saved))


class Uncertainty(nn.Module):
    """u(sigma): one linear layer over fixed random Fourier features of c_noise = ln(sigma / alpha) / 4; initially 0.

    Only `weights` is trained. Always computed in float32.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(CHANNELS, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(CHANNELS, generator=generator))
        self.weights = nn.Parameter(torch.zeros(CHANNELS))

    def u(self, level: Level) -> Tensor:
        """(B,) float32, on the device of the weights."""
        c_noise = (-clamp_snr(level).log() / 8).to(torch.float32).to(self.weights.device, non_blocking=True)
        waves = (c_noise[:, None] * self.frequencies + self.phases).cos()
        return (waves * self.weights).sum(1) * math.sqrt(2 / CHANNELS)  # no matmul: autocast would make it bf16

    def forward(self, loss: Tensor, level: Level) -> Tensor:
        """(B,) losses per sample -> what is minimized in their place."""
        u = self.u(level)
        return loss * (-u).exp() + u
