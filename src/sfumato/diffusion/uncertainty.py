"""A learned weight of the loss over noise levels (Karras et al. 2024, "Analyzing and Improving the Training Dynamics
of Diffusion Models", sec. 2 and appendix B; after Kendall et al. 2018).

Each loss L at noise level sigma becomes L / e^u(sigma) + u(sigma). The best u is the logarithm of the mean loss there,
so every noise level comes to weigh the same in the gradient, and keeps doing so while the loss falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from sfumato.config import LossOptions
from sfumato.diffusion.objective import Level
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.weightings import bounded_snr
from sfumato.errors import UserError

CHANNELS = 128
NAME = "uncertainty"  # of its group of parameters


def make_uncertainty(loss: LossOptions, seed: int, device: torch.device) -> Uncertainty | None:
    """What the options ask for: None where the weights of noise levels are not learned."""
    return Uncertainty(Randomness(seed).generator(NAME)).to(device) if loss.uncertainty_weighting else None


def resume_uncertainty(uncertainty: Uncertainty | None, saved: Mapping[str, Tensor]) -> None:
    """Take over a saved one; UserError where only one of the two runs has it."""
    if bool(saved) != (uncertainty is not None):
        had = "with" if saved else "without"
        raise UserError(f"the state was saved {had} --uncertainty_weighting", fix="the same, or start without --resume")
    if uncertainty is not None:
        uncertainty.load_state_dict(dict(saved))


class Uncertainty(nn.Module):
    """u(sigma): one linear layer over fixed random Fourier features of c_noise = ln(sigma / alpha) / 4; 0 at first.

    Only the weights of the sum learn. Computed in float32 whatever the model is computed in.
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
        c_noise = (-bounded_snr(level).log() / 8).to(torch.float32).to(self.weights.device, non_blocking=True)
        waves = (c_noise[:, None] * self.frequencies + self.phases).cos()
        return (waves * self.weights).sum(1) * math.sqrt(2 / CHANNELS)  # no matrix product: autocast lets this be

    def forward(self, loss: Tensor, level: Level) -> Tensor:
        """(B,) losses of samples -> what is minimised in their place."""
        u = self.u(level)
        return loss * (-u).exp() + u
