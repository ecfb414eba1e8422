"""Training objectives, how latents are noised and what the loss compares: variance-preserving and rectified flow.

Timesteps are 0 .. 1000, as in diffusers and sd-scripts. Levels are float64 on the CPU (a few numbers per step) and
take the dtype and device of what they multiply, so that no formula loses precision before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

TimestepGrid = Callable[[Any, int, int], None]  # (scheduler, steps, tokens): sets a diffusers scheduler's timesteps


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Shape and scale of a family's latents."""

    channels: int
    downscale: int
    patch: int
    scale: float
    shift: float
    size_multiple: int

    @property
    def token_side(self) -> int:
        """Pixels a side of one of the denoiser's tokens."""
        return self.downscale * self.patch

    def tokens(self, shape: Sequence[int]) -> int:
        """Number of the denoiser's tokens for a latent (..., h, w); resolution-dependent shifts use it."""
        return (shape[-2] // self.patch) * (shape[-1] // self.patch)


@dataclass(frozen=True)
class Level:
    """Noise levels of a batch, each (B,): x_t = alpha x0 + sigma noise."""

    t: Tensor  # 0 .. 1000 (variance preserving: an integer below 1000; flow: 1000 sigma)
    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        return (self.alpha / self.sigma) ** 2


class Objective(Protocol):
    """How latents are noised and what the loss compares."""

    @property
    def predicts(self) -> Literal["epsilon", "v", "velocity"]: ...

    def level(self, t: Tensor) -> Level: ...

    def add_noise(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor: ...

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor: ...

    def estimate(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        """The prediction in the space of `target`."""
        ...

    def estimate_image(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        """x0 as the prediction has it."""
        ...

    def image_error(self, level: Level, snr: Tensor) -> Tensor:
        """(B,): squared error of the image per squared error of the estimate; `snr` is finite and above 0."""
        ...

    def scheduler_options(self) -> dict[str, Any]:
        """Arguments of a diffusers scheduler that samples with this objective."""
        ...

    def set_timesteps(self, scheduler: Any, steps: int, latents: LatentSpec, shape: Sequence[int]) -> None:
        """Set a diffusers scheduler's timesteps as the family's own pipeline does."""
        ...

    def with_shift(self, shift: float) -> Objective | None:
        """The same with `shift` instead of the family's own in its time grid; None where the grid has no shift."""
        ...

    def scale_initial_noise(self, scheduler: Any, noise: Tensor) -> Tensor:
        """Standard normal noise -> the scheduler's first x."""
        ...

    def scale_model_input(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        """The scheduler's x at time t -> the model's input."""
        ...


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """(1000,) -> the same with the last value 0 and the first unchanged (Lin et al. 2024, alg. 1).

    Goes through single alphas as diffusers' schedulers do, to match their float32 values.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    rescaled = ((root - last) * (first / (first - last))) ** 2
    alphas = torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    betas = 1 - alphas
    return torch.cumprod(1 - betas, 0)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the dtype and on the device of `like` (B, C, h, w)."""
    moved = values.to(dtype=like.dtype).to(device=like.device, non_blocking=True)
    return moved.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class VariancePreserving:
    """DDPM (Ho et al. 2020, eq. 4) with 1000 scaled-linear betas; epsilon or v (Salimans & Ho 2022, sec. 4)."""

    predicts: Literal["epsilon", "v"] = "epsilon"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(1000,) float64; betas are float32, as every published checkpoint was trained with."""
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, 1000, dtype=torch.float32) ** 2
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        return (rescale_zero_terminal_snr(alphas_cumprod) if self.zero_terminal_snr else alphas_cumprod).double()

    def level(self, t: Tensor) -> Level:
        alphas_cumprod = self.alphas_cumprod[t.long()]
        return Level(t=t, alpha=alphas_cumprod.sqrt(), sigma=(1 - alphas_cumprod).sqrt())

    def add_noise(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return per_sample(level.alpha, x0) * x0 + per_sample(level.sigma, x0) * noise

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        if self.predicts == "epsilon":
            return noise
        return per_sample(level.alpha, x0) * noise - per_sample(level.sigma, x0) * x0

    def estimate(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        return prediction

    def estimate_image(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        alpha, sigma = per_sample(level.alpha, noisy), per_sample(level.sigma, noisy)
        if self.predicts == "v":
            return alpha * noisy - sigma * prediction
        return (noisy - sigma * prediction) / alpha.clamp(min=1e-4)  # at SNR 0 noise says nothing of the image

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
            # At SNR 0 only a v prediction says anything about the image.
            spacing = {"timestep_spacing": "trailing"} if self.predicts == "v" else {}
            options |= {"rescale_betas_zero_snr": True, **spacing}
        return options

    def set_timesteps(self, scheduler: Any, steps: int, latents: LatentSpec, shape: Sequence[int]) -> None:
        scheduler.set_timesteps(steps)

    def with_shift(self, shift: float) -> Objective | None:
        return None

    def scale_initial_noise(self, scheduler: Any, noise: Tensor) -> Tensor:
        return noise * scheduler.init_noise_sigma

    def scale_model_input(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        return scheduler.scale_model_input(x, t)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x_sigma = (1 - sigma) x0 + sigma noise; the model predicts the velocity noise - x0 (Liu et al. 2022, eq. 1).

    `space` is where prediction and target are compared: "raw" the velocity itself, "additive" velocity + x_sigma
    (the same loss), "sigma_scaled" the image x_sigma - sigma v (the velocity loss times sigma^2).
    """

    space: Literal["raw", "additive", "sigma_scaled"] = "raw"
    grid: TimestepGrid  # the family's sampling timesteps
    make_grid: Callable[[float], TimestepGrid] | None = None  # shift -> those with another shift
    default_sampling: str = "sigma"  # the family's timestep density where the options name none
    default_shift: float = 3.0  # and its shift
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

    def estimate_image(self, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
        return noisy - per_sample(level.sigma, noisy) * prediction

    def image_error(self, level: Level, snr: Tensor) -> Tensor:
        return torch.ones_like(snr) if self.space == "sigma_scaled" else level.sigma**2

    def scheduler_options(self) -> dict[str, Any]:
        return {"num_train_timesteps": 1000}

    def set_timesteps(self, scheduler: Any, steps: int, latents: LatentSpec, shape: Sequence[int]) -> None:
        self.grid(scheduler, steps, latents.tokens(shape))

    def with_shift(self, shift: float) -> Objective | None:
        return replace(self, grid=self.make_grid(shift)) if self.make_grid else None

    def scale_initial_noise(self, scheduler: Any, noise: Tensor) -> Tensor:
        return noise

    def scale_model_input(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        return x
