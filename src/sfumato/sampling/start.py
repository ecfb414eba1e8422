"""Denoising that starts from an image instead of noise, everywhere or within a mask, as in diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from sfumato.diffusion.noise import add_multires
from sfumato.diffusion.objective import Objective
from sfumato.sampling.settings import FirstNoise

PYRAMID_LAYERS = 6  # at most; it ends at one pixel


@dataclass(frozen=True, kw_only=True)
class Start:
    """The image that denoising starts from."""

    latents: Tensor  # (B, C, h, w), scaled
    strength: float  # share of the steps that are made, above 0 and up to 1
    mask: Tensor | None = None  # (B, 1, h, w): 1 where the image may change, 0 where it stays


def draw_first_noise(shape: Sequence[int], generator: Generator, settings: FirstNoise) -> Tensor:
    """(C, h, w): standard normal, where the settings ask for it with an offset for each channel and coarser layers."""
    noise = torch.randn(tuple(shape), generator=generator)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
    if settings.pyramid_noise_discount:
        noise = add_multires(noise, generator, PYRAMID_LAYERS, settings.pyramid_noise_discount)
    return noise


def skip_timesteps(scheduler: Any, objective: Objective, steps: int, strength: float) -> Tensor:
    """The timesteps that a start of this strength leaves, at least one; the scheduler knows where it begins.

    diffusers' pipelines of flow models round the number of skipped steps down, the others that of the steps made.
    """
    made = min(steps * strength, steps)
    skipped = int(steps - made) if objective.predicts == "velocity" else steps - int(made)
    first = min(skipped, steps - 1) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # not every scheduler of diffusers counts its steps
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]


def add_noise(scheduler: Any, objective: Objective, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The latents with the noise of this timestep, on the scale of the scheduler's x."""
    timesteps = t.reshape(1)
    if objective.predicts == "velocity":
        return scheduler.scale_noise(latents, timesteps, noise)
    return scheduler.add_noise(latents, noise, timesteps)


def start_from(scheduler: Any, objective: Objective, start: Start, noise: Tensor, t: Tensor) -> Tensor:
    """The first x at timestep t. A masked image of full strength starts from noise alone, as in diffusers."""
    if start.mask is not None and start.strength >= 1 and objective.predicts != "velocity":
        return objective.scale_initial_noise(scheduler, noise)
    return add_noise(scheduler, objective, start.latents, noise, t)


def keep_outside(
    scheduler: Any, objective: Objective, start: Start, x: Tensor, noise: Tensor, following: Tensor | None
) -> Tensor:
    """After a step: x within the mask, the image with the noise of the next timestep outside; None: after the last."""
    if start.mask is None:
        return x
    kept = start.latents if following is None else add_noise(scheduler, objective, start.latents, noise, following)
    return torch.lerp(kept, x, start.mask)
