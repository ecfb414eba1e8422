"""Timestep densities: flat functions that take uniform numbers to t in 0 .. 1000, all in float64.

A uniform number is the place of a sample in the density, and so says with how much noise it trains: drawn for each
sample by itself, or spread evenly over the samples. For flows a base density on (0, 1) is moved towards noise by a
shift, and squeezed between --min_timestep and --max_timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfumato.common.registry import Registry
from sfumato.config import NoiseOptions
from sfumato.diffusion.objective import LatentSpec, Objective, RectifiedFlow

Timestep = Callable[[Tensor, Sequence[int], LatentSpec], Tensor]  # u (B,) in [0, 1), latent shape (C, h, w) -> t (B,)
Density = Callable[[Tensor, NoiseOptions, int], Tensor]  # u, options with a shift, tokens -> sigma in [0, 1]
FLOW: Registry[Density] = Registry("timestep sampling")
WHOLE = frozenset({"whole_steps"})  # densities whose t is a whole number


def make_density(noise: NoiseOptions, objective: Objective) -> Timestep:
    """Uniform numbers -> t, float32, with the options bound."""
    minimum = noise.min_timestep or 0
    maximum = 1000 if noise.max_timestep is None else noise.max_timestep
    if not isinstance(objective, RectifiedFlow):
        return lambda u, shape, latents: uniform_index(u, minimum, maximum).float()
    name = noise.timestep_sampling or objective.usual_sampling
    density = FLOW.get(name)
    if noise.discrete_flow_shift is None:
        noise = noise.model_copy(update={"discrete_flow_shift": objective.usual_shift})

    def timestep(u: Tensor, shape: Sequence[int], latents: LatentSpec) -> Tensor:
        t = minimum + density(u, noise, latents.tokens(shape)) * (maximum - minimum)
        return (torch.floor(t) if name in WHOLE else t).float()

    return timestep


def quantiles(noise: NoiseOptions, count: int) -> list[int]:
    """`count` times that cut --min_timestep to --max_timestep into equal parts, rounded down; fewer where they meet.

    Without limits four of them are 200, 400, 600, 800, where the field validates.
    """
    minimum = noise.min_timestep or 0
    maximum = 1000 if noise.max_timestep is None else noise.max_timestep
    if minimum >= maximum:
        return [maximum - 1]
    return list(dict.fromkeys(minimum + (maximum - minimum) * i // (count + 1) for i in range(1, count + 1)))


def uniform_index(u: Tensor, minimum: int, maximum: int) -> Tensor:
    """A whole index, uniform in [minimum, maximum); an empty range gives the last one."""
    return torch.floor(minimum + u * (maximum - minimum)).clamp(max=maximum - 1)


@FLOW.register("sigma")
def sigma(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    """A density over a table of 1000 levels, shifted: more u is more noise, for every family alike."""
    return shifted(table_level(scheme_density(u, noise)), shift_of(noise))


@FLOW.register("whole_steps")
def whole_steps(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    """--weighting_scheme's density, moved by --training_shift; t is rounded down."""
    return shifted(scheme_density(u, noise), noise.training_shift)


@FLOW.register("uniform")
def uniform(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    return u


@FLOW.register("sigmoid")
def sigmoid(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    return torch.sigmoid(noise.sigmoid_scale * normal(u))


@FLOW.register("shift")
def shift(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    return shifted(sigmoid(u, noise, tokens), shift_of(noise))


@FLOW.register("flux_shift")
def flux_shift(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    """The more tokens an image has, the more noise it needs (Esser et al. 2024, sec. 5.3.2)."""
    return shifted(sigmoid(u, noise, tokens), math.exp(resolution_mu(tokens)))


@FLOW.register("nextdit_shift")
def nextdit_shift(u: Tensor, noise: NoiseOptions, tokens: int) -> Tensor:
    """Uniform, moved as by flux_shift; --sigmoid_scale has no say."""
    return shifted(u, math.exp(resolution_mu(tokens)))


def normal(u: Tensor) -> Tensor:
    """The standard normal number of which a share u of all is smaller; at 0 that is -inf, whose sigmoid is 0."""
    return torch.special.ndtri(u)


def shift_of(noise: NoiseOptions) -> float:
    """--discrete_flow_shift, which `make_density` has filled in where the user did not."""
    assert noise.discrete_flow_shift is not None
    return noise.discrete_flow_shift


def table_level(u: Tensor) -> Tensor:
    """u in [0, 1] -> the level 1/1000, 2/1000 .. 1 whose place it falls on."""
    return (torch.floor(u * 1000) + 1).clamp(1, 1000) / 1000


def scheme_density(u: Tensor, noise: NoiseOptions) -> Tensor:
    """--weighting_scheme as a density (Esser et al. 2024, sec. 3.1)."""
    if noise.weighting_scheme == "logit_normal":
        return torch.sigmoid(noise.logit_mean + noise.logit_std * normal(u))
    if noise.weighting_scheme == "mode":
        return 1 - u - noise.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_mu(tokens: int) -> float:
    """Linear in the number of tokens through (256, 0.5) and (4096, 1.15)."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
