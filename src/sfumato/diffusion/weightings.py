"""Loss weights by noise level: (level, objective) -> (B,)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.config import NoiseOptions
from sfumato.diffusion.objective import Level, Objective

Weighting = Callable[[Level, Objective], Tensor]
SMALLEST_SIGMA = 1e-3  # below the smallest level of the field's tables; keeps 1 / sigma^2 finite at the clean end


def make_weighting(noise: NoiseOptions) -> Weighting:
    return {"sigma_sqrt": sigma_sqrt, "cosmap": cosmap}.get(noise.weighting_scheme, uniform)


def uniform(level: Level, objective: Objective) -> Tensor:
    return torch.ones_like(level.alpha)


def sigma_sqrt(level: Level, objective: Objective) -> Tensor:
    """sigma^-2."""
    return level.sigma.clamp(min=SMALLEST_SIGMA) ** -2


def cosmap(level: Level, objective: Objective) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al. 2024, sec. 3.1)."""
    return 2 / (math.pi * (1 - 2 * level.sigma + 2 * level.sigma**2))
