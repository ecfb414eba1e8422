"""Timestep densities: flat functions of one sample's generator, each giving t in 0 .. 1000.

For flows a base density on (0, 1) is drawn, moved towards noise by a shift, and squeezed between
--min_timestep and --max_timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from sfumato.config import NoiseOptions
from sfumato.diffusion.objective import LatentSpec, Objective, RectifiedFlow
from sfumato.registry import Registry

Density = Callable[[Generator, NoiseOptions, int], Tensor]  # generator, options with a shift, tokens -> sigma in (0, 1)
FLOW: Registry[Density] = Registry("timestep sampling")
WHOLE = frozenset({"whole_steps"})  # densities whose t is a whole number


def make_density(noise: NoiseOptions, objective: Objective) -> Callable[[Generator, Sequence[int], LatentSpec], Tensor]:
    """The draw of one sample's t, with the options bound."""
    minimum = noise.min_timestep or 0
    maximum = 1000 if noise.max_timestep is None else noise.max_timestep
    if not isinstance(objective, RectifiedFlow):
        return lambda generator, shape, latents: uniform_index(generator, minimum, maximum)
    name = noise.timestep_sampling or objective.usual_sampling
    density = FLOW.get(name)
    if noise.discrete_flow_shift is None:
        noise = noise.model_copy(update={"discrete_flow_shift": objective.usual_shift})

    def draw(generator: Generator, shape: Sequence[int], latents: LatentSpec) -> Tensor:
        sigma = density(generator, noise, latents.tokens(shape))
        t = minimum + sigma * (maximum - minimum)
        return torch.floor(t) if name in WHOLE else t

    return draw


def quantiles(noise: NoiseOptions, count: int) -> list[int]:
    """`count` times that cut --min_timestep to --max_timestep into equal parts, rounded down; fewer where they meet.

    Without limits four of them are 200, 400, 600, 800, where the field validates.
    """
    minimum = noise.min_timestep or 0
    maximum = 1000 if noise.max_timestep is None else noise.max_timestep
    if minimum >= maximum:
        return [maximum - 1]
    return list(dict.fromkeys(minimum + (maximum - minimum) * i // (count + 1) for i in range(1, count + 1)))


def uniform_index(generator: Generator, minimum: int, maximum: int) -> Tensor:
    """A whole index, uniform in [minimum, maximum); an empty range gives the last one."""
    if minimum >= maximum:
        return torch.tensor(float(maximum - 1))
    return torch.randint(minimum, maximum, (), generator=generator).float()


@FLOW.register("sigma")
def sigma(generator: Generator, noise: NoiseOptions, tokens: int) -> Tensor:
    """A density over a table of 1000 levels, shifted: more u is more noise, for every family alike."""
    u = scheme_density(torch.rand((), generator=generator), torch.randn((), generator=generator), noise)
    return shifted(table_level(u), shift_of(noise))


@FLOW.register("whole_steps")
def whole_steps(generator: Generator, noise: NoiseOptions, tokens: int) -> Tensor:
    """--weighting_scheme's density, moved by --training_shift; t is rounded down."""
    u = scheme_density(torch.rand((), generator=generator), torch.randn((), generator=generator), noise)
    return shifted(u, noise.training_shift)


@FLOW.register("uniform")
def uniform(generator: Generator, noise: NoiseOptions, tokens: int) -> Tensor:
    return torch.rand((), generator=generator)


@FLOW.register("sigmoid")
def sigmoid(generator: Generator, noise: NoiseOptions, tokens: int) -> Tensor:
    return torch.sigmoid(noise.sigmoid_scale * torch.randn((), generator=generator))


@FLOW.register("shift")
def shift(generator: Generator, noise: NoiseOptions, tokens: int) -> Tensor:
    return shifted(sigmoid(generator, noise, tokens), shift_of(noise))


@FLOW.register("flux_shift")
def flux_shift(generator: Generator, noise: NoiseOptions, tokens: int) -> Tensor:
    """The more tokens an image has, the more noise it needs (Esser et al. 2024, sec. 5.3.2)."""
    return shifted(sigmoid(generator, noise, tokens), math.exp(resolution_mu(tokens)))


@FLOW.register("nextdit_shift")
def nextdit_shift(generator: Generator, noise: NoiseOptions, tokens: int) -> Tensor:
    """Uniform, moved as by flux_shift; --sigmoid_scale has no say."""
    return shifted(uniform(generator, noise, tokens), math.exp(resolution_mu(tokens)))


def shift_of(noise: NoiseOptions) -> float:
    """--discrete_flow_shift, which `make_density` has filled in where the user did not."""
    assert noise.discrete_flow_shift is not None
    return noise.discrete_flow_shift


def table_level(u: Tensor) -> Tensor:
    """u in [0, 1) -> the level 1/1000, 2/1000 .. 1 whose place it falls on."""
    return (torch.floor(u * 1000) + 1) / 1000


def scheme_density(u: Tensor, z: Tensor, noise: NoiseOptions) -> Tensor:
    """--weighting_scheme as a density (Esser et al. 2024, sec. 3.1) from a uniform u and a normal z."""
    if noise.weighting_scheme == "logit_normal":
        return torch.sigmoid(noise.logit_mean + noise.logit_std * z)
    if noise.weighting_scheme == "mode":
        return 1 - u - noise.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_mu(tokens: int) -> float:
    """Linear in the number of tokens through (256, 0.5) and (4096, 1.15)."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
