"""Loss weights by noise level: (level, objective) -> (B,), float64.

Several weightings multiply. A formula that is infinite at SNR 0, where the input is pure noise, is 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.objective import Level, Objective

Weighting = Callable[[Level, Objective], Tensor]
SMALLEST_SIGMA = 1e-3  # below the smallest level of sd-scripts' tables; keeps 1 / sigma^2 finite at a clean image
MIN_SNR, MAX_SNR = 1e-8, 1e8
SNR_CAP = 1000.0  # sd-scripts' cap in its weights for v prediction and debiased estimation


def make_weighting(noise: NoiseOptions, loss: LossOptions) -> Weighting:
    """The product of all weightings that the options enable."""
    weightings: list[Weighting] = []
    if noise.weighting_scheme in SCHEMES:
        weightings.append(SCHEMES[noise.weighting_scheme])
    if loss.min_snr_gamma is not None:
        weightings.append(min_snr(loss.min_snr_gamma))
    if loss.soft_min_snr_gamma is not None:
        weightings.append(soft_min_snr(loss.soft_min_snr_gamma))
    if loss.p2_gamma is not None:
        weightings.append(p2(loss.p2_gamma, loss.p2_k))
    if loss.scale_v_pred_loss_like_noise_pred:
        weightings.append(scale_v_like_noise)
    if loss.v_pred_like_loss is not None:
        weightings.append(v_pred_like(loss.v_pred_like_loss))
    if loss.debiased_estimation_loss:
        weightings.append(debiased_estimation)
    return multiply(weightings)


def multiply(weightings: list[Weighting]) -> Weighting:
    def combine(level: Level, objective: Objective) -> Tensor:
        weight = torch.ones_like(level.alpha)
        for weighting in weightings:
            weight = weight * weighting(level, objective)
        return weight

    return combine


def sigma_sqrt(level: Level, objective: Objective) -> Tensor:
    """sigma^-2."""
    return level.sigma.clamp(min=SMALLEST_SIGMA) ** -2


def cosmap(level: Level, objective: Objective) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al. 2024, sec. 3.1)."""
    return 2 / (math.pi * (1 - 2 * level.sigma + 2 * level.sigma**2))


SCHEMES: dict[str, Weighting] = {"sigma_sqrt": sigma_sqrt, "cosmap": cosmap}


def image_weighting(weight: Callable[[Tensor], Tensor]) -> Weighting:
    """A weight of the image's squared error, as a function of SNR, turned into one of what the objective compares.

    That is times the image's squared error per squared error of the estimate: 1 / SNR for noise, sigma^2 for v and
    velocity.
    """

    def weighting(level: Level, objective: Objective) -> Tensor:
        snr = clamp_snr(level)
        return weight(snr) * objective.image_error(level, snr)

    return weighting


def min_snr(gamma: float) -> Weighting:
    """min(SNR, gamma) (Hang et al. 2023, sec. 3.4)."""
    return image_weighting(lambda snr: snr.clamp(max=gamma))


def soft_min_snr(gamma: float) -> Weighting:
    """gamma SNR / (gamma + SNR): a smooth min-SNR (Crowson et al. 2024, sec. 4.3)."""
    return image_weighting(lambda snr: gamma * snr / (gamma + snr))


def p2(gamma: float, k: float) -> Weighting:
    """SNR / (k + SNR)^gamma; for noise (k + SNR)^-gamma (Choi et al. 2022, eq. 8)."""
    return image_weighting(lambda snr: snr / (k + snr) ** gamma)


def scale_v_like_noise(level: Level, objective: Objective) -> Tensor:
    """SNR / (SNR + 1): weights a loss on v like one on noise."""
    snr = cap_snr(level)
    return snr / (snr + 1)


def v_pred_like(strength: float) -> Weighting:
    """1 + strength (SNR + 1) / SNR: a loss on noise plus `strength` times one on v."""
    return lambda level, objective: 1 + strength * where_snr_positive(level, lambda snr: (snr + 1) / snr)


def debiased_estimation(level: Level, objective: Objective) -> Tensor:
    """1 / sqrt(SNR) for noise (Yu et al. 2024, eq. 12), 1 / (SNR + 1) for v."""
    if objective.predicts == "v":
        return 1 / (cap_snr(level) + 1)
    return where_snr_positive(level, lambda snr: snr**-0.5)


def clamp_snr(level: Level) -> Tensor:
    """SNR within MIN_SNR .. MAX_SNR, so that its logarithm and inverse are finite."""
    return level.snr.clamp(MIN_SNR, MAX_SNR)


def cap_snr(level: Level) -> Tensor:
    return level.snr.clamp(max=SNR_CAP)


def where_snr_positive(level: Level, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight of the capped SNR; 0 at SNR 0."""
    snr = cap_snr(level)
    positive = snr > 0
    return torch.where(positive, weight(snr.where(positive, torch.ones_like(snr))), torch.zeros_like(snr))
