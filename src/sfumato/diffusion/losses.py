"""Elementwise loss functions: (estimate, target, level) -> a tensor of the same shape."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.common.extensions import LOSSES_GROUP, find_registered
from sfumato.common.registry import Registry
from sfumato.config import LossOptions
from sfumato.diffusion.objective import Level, per_sample

Loss = Callable[[Tensor, Tensor, Level], Tensor]
Threshold = Callable[[Level, LossOptions], Tensor]  # (B,): where a robust loss turns from quadratic to linear
LOSSES: Registry[Callable[[LossOptions], Loss]] = Registry("loss type")
HUBER_SCHEDULES: Registry[Threshold] = Registry("huber schedule")


def make_loss(options: LossOptions) -> Loss:
    """UserError where a module was named that registers none."""
    name = find_registered(LOSSES, options.loss_type, group=LOSSES_GROUP, option="--loss_type")
    return LOSSES.get(name)(options)


@LOSSES.register("l2")
def l2(options: LossOptions) -> Loss:
    return lambda estimate, target, level: (estimate - target) ** 2


@LOSSES.register("l1")
def l1(options: LossOptions) -> Loss:
    return lambda estimate, target, level: (estimate - target).abs()


@LOSSES.register("huber")
def huber(options: LossOptions) -> Loss:
    """2 c (sqrt(d^2 + c^2) - c), the pseudo-Huber loss: d^2 where d is small, 2 c |d| where it is large."""
    threshold = HUBER_SCHEDULES.get(options.huber_schedule)

    def loss(estimate: Tensor, target: Tensor, level: Level) -> Tensor:
        c = per_sample(threshold(level, options), estimate)
        return 2 * c * _pseudo_huber(estimate - target, c)

    return loss


@LOSSES.register("smooth_l1")
def smooth_l1(options: LossOptions) -> Loss:
    """2 (sqrt(d^2 + c^2) - c): d^2 / c where d is small, 2 |d| where it is large."""
    threshold = HUBER_SCHEDULES.get(options.huber_schedule)
    return lambda estimate, target, level: (
        2 * _pseudo_huber(estimate - target, per_sample(threshold(level, options), estimate))
    )


@HUBER_SCHEDULES.register("constant")
def constant_threshold(level: Level, options: LossOptions) -> Tensor:
    return torch.full_like(level.alpha, options.huber_c * options.huber_scale)


@HUBER_SCHEDULES.register("exponential")
def exponential_threshold(level: Level, options: LossOptions) -> Tensor:
    """From 1 at t = 0 to huber_c at t = 1000, times huber_scale."""
    return torch.exp(math.log(options.huber_c) * level.t.to(level.alpha) / 1000) * options.huber_scale


@HUBER_SCHEDULES.register("snr")
def snr_threshold(level: Level, options: LossOptions) -> Tensor:
    """(1 - c) / (1 + SNR^(-1/2))^2 + c, times huber_scale: from 1 at a clean image to huber_c at pure noise.

    SNR^(-1/2) is sigma / alpha for every objective, so the schedule also works for flows.
    """
    c = options.huber_c
    return ((1 - c) / (1 + level.sigma / level.alpha) ** 2 + c) * options.huber_scale


def _pseudo_huber(d: Tensor, c: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c."""
    return torch.sqrt(d**2 + c**2) - c
