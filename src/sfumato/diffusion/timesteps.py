"""Timestep densities: flat functions that map uniform numbers to t in 0 .. 1000, in float64.

The uniform number of a sample is its quantile in the density: independent per sample, or stratified. For flows a base
density on (0, 1) is moved towards noise by a shift and scaled to --min_timestep .. --max_timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfumato.common.registry import Registry
from sfumato.config import NoiseOptions
from sfumato.diffusion.objective import LatentSpec, Objective, RectifiedFlow, TimestepGrid

Sigma = TypeVar("Sigma", float, Tensor)
Timestep = Callable[[Tensor, Sequence[int], LatentSpec], Tensor]  # u (B,) in [0, 1), latent shape (C, h, w) -> t (B,)
Density = Callable[[Tensor, NoiseOptions, int], Tensor]  # u, options with a shift, tokens -> sigma in [0, 1]
FLOW_DENSITIES: Registry[Density] = Registry("timestep sampling")
INTEGER_DENSITIES = frozenset({"whole_steps"})  # t is rounded down to an integer
SCHEME_DENSITIES = frozenset({"sigma", "whole_steps"})  # those that read --weighting_scheme


def make_density(noise: NoiseOptions, objective: Objective) -> Timestep:
    """The density that the options name: uniform numbers -> t, float32."""
    minimum = noise.min_timestep or 0
    maximum = 1000 if noise.max_timestep is None else noise.max_timestep
    if not isinstance(objective, RectifiedFlow):
        return lambda u, shape, latents: uniform_index(u, minimum, maximum).float()
    name = noise.timestep_sampling or objective.default_sampling
    density = FLOW_DENSITIES.get(name)
    if noise.discrete_flow_shift is None:
        noise = noise.model_copy(update={"discrete_flow_shift": objective.default_shift})

    def timestep(u: Tensor, shape: Sequence[int], latents: LatentSpec) -> Tensor:
        t = minimum + density(u, noise, latents.tokens(shape)) * (maximum - minimum)
        return (torch.floor(t) if name in INTEGER_DENSITIES else t).float()

    return timestep


def timestep_quantiles(noise: NoiseOptions, count: int) -> list[int]:
    """`count` timesteps that divide --min_timestep .. --max_timestep into equal parts, rounded down, without repeats.

    Four of them are 200, 400, 600, 800 by default.
    """
    minimum = noise.min_timestep or 0
    maximum = 1000 if noise.max_timestep is None else noise.max_timestep
    if minimum >= maximum:
        return [maximum - 1]
    return list(dict.fromkeys(minimum + (maximum - minimum) * i // (count + 1) for i in range(1, count + 1)))


def offset_quantile(u: Tensor, offset: Tensor) -> Tensor:
    """The uniform number whose normal quantile is larger by `offset`: more noise where that is above 0."""
    return torch.special.ndtr(normal(u) + offset)


def is_falling(noise: NoiseOptions, objective: Objective) -> bool:
    """Whether larger uniform numbers mean less noise in the density that the options name."""
    if not isinstance(objective, RectifiedFlow) or noise.weighting_scheme != "mode":
        return False
    return (noise.timestep_sampling or objective.default_sampling) in SCHEME_DENSITIES


def uniform_index(u: Tensor, minimum: int, maximum: int) -> Tensor:
    """An integer, uniform in [minimum, maximum); maximum - 1 where that range is empty."""
    return torch.floor(minimum + u * (maximum - minimum)).clamp(max=maximum - 1)


@FLOW_DENSITIES.register("sigma")
def sigma(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    """--weighting_scheme's density over a table of 1000 levels, shifted; larger u is more noise for every family."""
    return shift_sigma(table_level(scheme_density(u, noise)), flow_shift(noise))


@FLOW_DENSITIES.register("whole_steps")
def whole_steps(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    """--weighting_scheme's density, shifted by --training_shift; t is rounded down."""
    return shift_sigma(scheme_density(u, noise), noise.training_shift)


@FLOW_DENSITIES.register("uniform")
def uniform(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    return u


@FLOW_DENSITIES.register("sigmoid")
def sigmoid(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    return torch.sigmoid(noise.sigmoid_scale * normal(u))


@FLOW_DENSITIES.register("shift")
def shift(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    return shift_sigma(sigmoid(u, noise, tokens), flow_shift(noise))


@FLOW_DENSITIES.register("flux_shift")
def flux_shift(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    """Shifted by resolution: more tokens, more noise (Esser et al. 2024, sec. 5.3.2)."""
    return shift_sigma(sigmoid(u, noise, tokens), math.exp(resolution_mu(tokens)))


@FLOW_DENSITIES.register("nextdit_shift")
def nextdit_shift(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    """Uniform, shifted as by flux_shift; --sigmoid_scale has no effect."""
    return shift_sigma(u, math.exp(resolution_mu(tokens)))


def normal(u: Tensor) -> Tensor:
    """The standard normal quantile of u; -inf at 0, whose sigmoid is 0."""
    return torch.special.ndtri(u)


def flow_shift(noise: NoiseOptions) -> float:
    """--discrete_flow_shift; `make_density` sets it to the family's default where it is None."""
    assert noise.discrete_flow_shift is not None
    return noise.discrete_flow_shift


def table_level(u: Tensor) -> Tensor:
    """u in [0, 1] -> the entry of the table 1/1000, 2/1000 .. 1 at that quantile."""
    return (torch.floor(u * 1000) + 1).clamp(1, 1000) / 1000


def scheme_density(u: Tensor, noise: NoiseOptions) -> Tensor:
    """--weighting_scheme as a density (Esser et al. 2024, sec. 3.1)."""
    if noise.weighting_scheme == "logit_normal":
        return torch.sigmoid(noise.logit_mean + noise.logit_std * normal(u))
    if noise.weighting_scheme == "mode":
        return 1 - u - noise.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_time_grid(sigmas: Callable[[int, int], Sequence[float]]) -> TimestepGrid:
    """A grid of a family's sampling from its falling sigmas; sigmas: steps, tokens -> one for each step."""

    def set_timesteps(scheduler: Any, steps: int, tokens: int) -> None:
        scheduler.set_timesteps(sigmas=list(sigmas(steps, tokens)))

    return set_timesteps


def resolution_mu(tokens: int) -> float:
    """Linear in the number of tokens through (256, 0.5) and (4096, 1.15)."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
