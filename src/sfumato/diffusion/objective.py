"""How an image is noised and what is compared: variance-preserving diffusion and rectified flow.

Time runs in the field's unit, 0 .. 1000. Levels are float64 on the CPU (a handful of numbers a step) and
take the dtype and device of what they multiply, so that no formula loses precision before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Grid = Callable[[Any, int, int], None]  # gives a diffusers scheduler its levels; steps, tokens


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Shape facts of a latent; `tokens` serves resolution-dependent shifts, in training and in sampling."""

    channels: int
    downscale: int
    patch: int
    scale: float
    shift: float
    size_multiple: int

    def tokens(self, shape: Sequence[int]) -> int:
        """Number of tokens the denoiser sees for a latent (..., h, w)."""
        return (shape[-2] // self.patch) * (shape[-1] // self.patch)


@dataclass(frozen=True)
class Level:
    """Each sample's place on the noise axis, (B,); all that losses and weightings may ask."""

    t: Tensor  # 0 .. 1000 (variance preserving: a whole index below 1000; flow: 1000 sigma)
    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        return (self.alpha / self.sigma) ** 2


class Objective(Protocol):
    """How an image is noised and what is compared."""

    @property
    def predicts(self) -> Literal["epsilon", "v", "velocity"]: ...

    def level(self, t: Tensor) -> Level: ...

    def add_noise(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor: ...

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor: ...

    def estimate(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        """The prediction in the space of `target`."""
        ...

    def image_error(self, level: Level, snr: Tensor) -> Tensor:
        """(B,): squared error of the image for each squared error of the estimate; `snr` kept from 0 and infinity."""
        ...

    def scheduler_options(self) -> dict[str, Any]:
        """What a diffusers scheduler must be told to sample with this objective."""
        ...

    def set_timesteps(self, scheduler: Any, steps: int, latents: LatentSpec, shape: Sequence[int]) -> None:
        """Give a diffusers scheduler the time grid that the family's own pipeline uses."""
        ...

    def at_shift(self, shift: float) -> Objective | None:
        """The same with its time grid moved by `shift` instead of the family's own; None: it has no such grid."""
        ...

    def first_noise(self, scheduler: Any, noise: Tensor) -> Tensor:
        """Standard normal noise at the strength with which the scheduler starts."""
        ...

    def scheduler_input(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        """What the model sees of the scheduler's x at time t."""
        ...


def ending_in_noise(alphas_cumprod: Tensor) -> Tensor:
    """(1000,) -> the same with nothing left of the image at the end, and the beginning where it was.

    Taken through single alphas, as samplers do, so that their float32 values are met.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    kept = ((root - last) * (first / (first - last))) ** 2
    alphas = torch.cat([kept[:1], kept[1:] / kept[:-1]])
    betas = 1 - alphas
    return torch.cumprod(1 - betas, 0)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the dtype and on the device of `like` (B, C, h, w)."""
    moved = values.to(dtype=like.dtype).to(device=like.device, non_blocking=True)
    return moved.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class VariancePreserving:
    """DDPM (Ho et al. 2020, eq. 4) with 1000 scaled-linear betas; epsilon or v (Salimans & Ho 2022, sec. 4).

    `zero_terminal_snr` moves and stretches sqrt(alphas_cumprod) so that its last value is 0 (Lin et al. 2024, alg. 1).
    """

    predicts: Literal["epsilon", "v"] = "epsilon"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(1000,) float64; betas are taken in float32 as every published checkpoint was trained with."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, 1000, dtype=torch.float32) ** 2
        kept = torch.cumprod(1 - betas, 0)
        return (ending_in_noise(kept) if self.zero_terminal_snr else kept).double()

    def level(self, t: Tensor) -> Level:
        kept = self.alphas_cumprod[t.long()]
        return Level(t=t, alpha=kept.sqrt(), sigma=(1 - kept).sqrt())

    def add_noise(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return per_sample(level.alpha, x0) * x0 + per_sample(level.sigma, x0) * noise

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        if self.predicts == "epsilon":
            return noise
        return per_sample(level.alpha, x0) * noise - per_sample(level.sigma, x0) * x0

    def estimate(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        return prediction

    def image_error(self, level: Level, snr: Tensor) -> Tensor:
        return 1 / snr if self.predicts == "epsilon" else level.sigma**2

    def scheduler_options(self) -> dict[str, Any]:
        options = {
            "num_train_timesteps": 1000,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction" if self.predicts == "v" else "epsilon",
        }
        if self.zero_terminal_snr:
            # Only v tells anything about the picture where nothing is left of it.
            spacing = {"timestep_spacing": "trailing"} if self.predicts == "v" else {}
            options |= {"rescale_betas_zero_snr": True, **spacing}
        return options

    def set_timesteps(self, scheduler: Any, steps: int, latents: LatentSpec, shape: Sequence[int]) -> None:
        scheduler.set_timesteps(steps)

    def at_shift(self, shift: float) -> Objective | None:
        return None

    def first_noise(self, scheduler: Any, noise: Tensor) -> Tensor:
        return noise * scheduler.init_noise_sigma

    def scheduler_input(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        return scheduler.scale_model_input(x, t)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x_sigma = (1 - sigma) x0 + sigma noise; the model gives the velocity noise - x0 (Liu et al. 2022, eq. 1).

    `space` is where prediction and target are compared: "raw" the velocity itself, "additive" velocity + x_sigma
    (the same loss), "sigma_scaled" the image x_sigma - sigma v (the velocity loss times sigma^2).
    """

    space: Literal["raw", "additive", "sigma_scaled"] = "raw"
    grid: Grid  # the family's time grid
    grid_at: Callable[[float], Grid] | None = None  # and the one with another shift
    usual_sampling: str = "sigma"  # the family's density of timesteps where the options name none
    usual_shift: float = 3.0  # and its shift
    predicts: Literal["velocity"] = "velocity"

    def level(self, t: Tensor) -> Level:
        sigma = t.double() / 1000
        return Level(t=t, alpha=1 - sigma, sigma=sigma)

    def add_noise(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return per_sample(level.alpha, x0) * x0 + per_sample(level.sigma, x0) * noise

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        if self.space == "sigma_scaled":
            return x0
        velocity = noise - x0
        return velocity if self.space == "raw" else velocity + self.add_noise(x0, noise, level)

    def estimate(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        if self.space == "sigma_scaled":
            return noisy - per_sample(level.sigma, noisy) * prediction
        return prediction if self.space == "raw" else prediction + noisy

    def image_error(self, level: Level, snr: Tensor) -> Tensor:
        return torch.ones_like(snr) if self.space == "sigma_scaled" else level.sigma**2

    def scheduler_options(self) -> dict[str, Any]:
        return {"num_train_timesteps": 1000}

    def set_timesteps(self, scheduler: Any, steps: int, latents: LatentSpec, shape: Sequence[int]) -> None:
        self.grid(scheduler, steps, latents.tokens(shape))

    def at_shift(self, shift: float) -> Objective | None:
        return replace(self, grid=self.grid_at(shift)) if self.grid_at else None

    def first_noise(self, scheduler: Any, noise: Tensor) -> Tensor:
        return noise

    def scheduler_input(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        return x
