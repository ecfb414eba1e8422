"""Loss weights by noise level: (level, objective) -> (B,), float64.

Several may be asked for; they multiply. Where a formula grows beyond bounds as nothing of the image is left (SNR 0),
the sample, which has nothing to tell, weighs nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.config import LossOptions, NoiseOptions
from sfumato.diffusion.objective import Level, Objective

Weighting = Callable[[Level, Objective], Tensor]
SMALLEST_SIGMA = 1e-3  # below the smallest level of the field's tables; keeps 1 / sigma^2 finite at the clean end
CLEAN, LOST = 1e8, 1e-8  # SNR beyond which an image has no noise, and a noise no image
LARGEST_SNR = 1000.0  # at which the field caps it in the weights of its own making


def make_weighting(noise: NoiseOptions, loss: LossOptions) -> Weighting:
    """The product of everything that the options ask for."""
    asked: list[Weighting] = []
    if noise.weighting_scheme in SCHEMES:
        asked.append(SCHEMES[noise.weighting_scheme])
    if loss.min_snr_gamma is not None:
        asked.append(min_snr(loss.min_snr_gamma))
    if loss.soft_min_snr_gamma is not None:
        asked.append(soft_min_snr(loss.soft_min_snr_gamma))
    if loss.p2_gamma is not None:
        asked.append(p2(loss.p2_gamma, loss.p2_k))
    if loss.scale_v_pred_loss_like_noise_pred:
        asked.append(scale_v_like_noise)
    if loss.v_pred_like_loss is not None:
        asked.append(v_pred_like(loss.v_pred_like_loss))
    if loss.debiased_estimation_loss:
        asked.append(debiased)
    return product(asked)


def product(asked: list[Weighting]) -> Weighting:
    def weighting(level: Level, objective: Objective) -> Tensor:
        weight = torch.ones_like(level.alpha)
        for one in asked:
            weight = weight * one(level, objective)
        return weight

    return weighting


def sigma_sqrt(level: Level, objective: Objective) -> Tensor:
    """sigma^-2."""
    return level.sigma.clamp(min=SMALLEST_SIGMA) ** -2


def cosmap(level: Level, objective: Objective) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al. 2024, sec. 3.1)."""
    return 2 / (math.pi * (1 - 2 * level.sigma + 2 * level.sigma**2))


SCHEMES: dict[str, Weighting] = {"sigma_sqrt": sigma_sqrt, "cosmap": cosmap}


def of_image(weight: Callable[[Tensor], Tensor]) -> Weighting:
    """A weight of the squared error of the image, as a function of SNR, for what the objective compares.

    Times the square of how much the image errs for an error of 1: for noise 1 / SNR, for v and velocity sigma^2.
    """

    def weighting(level: Level, objective: Objective) -> Tensor:
        snr = bounded_snr(level)
        return weight(snr) * objective.image_error(level, snr)

    return weighting


def min_snr(gamma: float) -> Weighting:
    """min(SNR, gamma) (Hang et al. 2023, sec. 3.4)."""
    return of_image(lambda snr: snr.clamp(max=gamma))


def soft_min_snr(gamma: float) -> Weighting:
    """gamma SNR / (gamma + SNR): the same without its corner (Crowson et al. 2024, sec. 4.3)."""
    return of_image(lambda snr: gamma * snr / (gamma + snr))


def p2(gamma: float, k: float) -> Weighting:
    """SNR / (k + SNR)^gamma, which is (k + SNR)^-gamma for noise (Choi et al. 2022, eq. 8)."""
    return of_image(lambda snr: snr / (k + snr) ** gamma)


def scale_v_like_noise(level: Level, objective: Objective) -> Tensor:
    """SNR / (SNR + 1): a loss on v, weighted as one on noise."""
    snr = capped_snr(level)
    return snr / (snr + 1)


def v_pred_like(strength: float) -> Weighting:
    """1 + strength (SNR + 1) / SNR: a loss on noise plus a share of one on v."""
    return lambda level, objective: 1 + strength * where_image_is_left(level, lambda snr: (snr + 1) / snr)


def debiased(level: Level, objective: Objective) -> Tensor:
    """1 / sqrt(SNR) for noise (Yu et al. 2024, eq. 12), 1 / (SNR + 1) for v."""
    if objective.predicts == "v":
        return 1 / (capped_snr(level) + 1)
    return where_image_is_left(level, lambda snr: snr**-0.5)


def bounded_snr(level: Level) -> Tensor:
    return level.snr.clamp(LOST, CLEAN)


def capped_snr(level: Level) -> Tensor:
    return level.snr.clamp(max=LARGEST_SNR)


def where_image_is_left(level: Level, weight: Callable[[Tensor], Tensor]) -> Tensor:
    snr = capped_snr(level)
    left = snr > 0
    return torch.where(left, weight(snr.where(left, torch.ones_like(snr))), torch.zeros_like(snr))
