"""Gradual Latent, latents that start small and grow in some steps of the Euler ancestral sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from sfumato.sampling.settings import GradualLatent


@dataclass(frozen=True)
class Unsharp:
    """Sharpens what has been enlarged: x + strength (x - blurred x)."""

    kernel_size: int = 0  # 0: nothing is sharpened
    sigma: float = 0.5
    strength: float = 0.5
    of_latents: bool = True  # else of the step's direction

    def sharpen(self, x: Tensor) -> Tensor:
        """x (B, C, h, w)."""
        if not self.kernel_size:
            return x
        return x + self.strength * (x - blur(x, self.kernel_size, self.sigma))


def blur(x: Tensor, size: int, sigma: float) -> Tensor:
    """x (B, C, h, w) with a Gaussian kernel of an odd size, reflected at its edges."""
    places = torch.arange(size, dtype=x.dtype, device=x.device) - size // 2
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, size)
    half = min(size // 2, x.shape[-1] - 1, x.shape[-2] - 1)
    kernel = kernel[..., size // 2 - half : size // 2 + half + 1]
    kernel = kernel / kernel.sum(-1, keepdim=True)
    padded = F.pad(x, (half,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel[..., None], groups=x.shape[1])
    return F.conv2d(rows, kernel[..., None, :], groups=x.shape[1])


def parse_unsharp(text: str | None) -> Unsharp:
    """ "9,0.5,0.5,1" -> kernel size (made odd), sigma, strength, whether the latents are sharpened."""
    if not text:
        return Unsharp()
    size, sigma, strength, *target = (float(part) for part in text.split(","))
    return Unsharp(int(size) | 1, sigma, strength, bool(target[0]) if target else True)


@dataclass
class Growth:
    """The sizes of one denoising; full: the last size (h, w)."""

    settings: GradualLatent
    full: tuple[int, int]
    unsharp: Unsharp = field(default_factory=Unsharp)
    ratio: float = 1.0
    first: int | None = None  # the step at which it began to grow

    @classmethod
    def start(cls, settings: GradualLatent, full: tuple[int, int]) -> Growth:
        unsharp = parse_unsharp(settings.gradual_latent_unsharp_params)
        return cls(settings, full, unsharp, settings.gradual_latent_ratio)

    @property
    def size(self) -> tuple[int, int]:
        """The latents' size now, (h, w); even, as the UNet's first downsampling needs it."""
        height, width = (max(2, int(side * self.ratio) // 2 * 2) if self.ratio < 1 else side for side in self.full)
        return height, width

    def shrink(self, noise: Tensor) -> Tensor:
        """The first noise (B, C, h, w) at the first size, standard normal again."""
        return noise[..., : self.size[0], : self.size[1]].contiguous()

    def is_due(self, step: int, t: Tensor, *, is_last: bool) -> bool:
        """Whether this step enlarges the latents; it then takes the next ratio, in the last step the whole."""
        if is_last and self.ratio < 1:
            self.ratio = 1.0
            return True
        if self.ratio >= 1 or float(t) > self.settings.gradual_latent_timesteps:
            return False
        self.first = step if self.first is None else self.first
        if (step - self.first) % self.settings.gradual_latent_every_n_steps:
            return False
        self.ratio = min(1.0, self.ratio + self.settings.gradual_latent_ratio_step)
        return True

    def step(
        self, scheduler: Any, prediction: Tensor, t: Tensor, x: Tensor, generators: Generator | list[Generator]
    ) -> Tensor:
        """A step of the Euler ancestral sampler (Karras et al. 2022, as in k-diffusion) to latents of the next size."""
        known = scheduler.step(prediction, t, x, generator=Generator(), return_dict=True)  # it counts its steps
        index = scheduler.step_index - 1
        now, after = (float(sigma) for sigma in scheduler.sigmas[index : index + 2])
        up = (after**2 * (now**2 - after**2) / now**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        direction = (x - known.pred_original_sample) / now
        if self.unsharp.of_latents:
            grown = self.unsharp.sharpen(self.enlarge(x + direction * (down - now)))
        else:
            grown = self.enlarge(x) + self.unsharp.sharpen(self.enlarge(direction)) * (down - now)
        return grown + draw_like(grown, generators) * up * self.settings.gradual_latent_s_noise

    def enlarge(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size, mode="bicubic")


def draw_like(x: Tensor, generators: Generator | list[Generator]) -> Tensor:
    """Standard normal noise (B, C, h, w), drawn on the CPU."""
    if isinstance(generators, Generator):
        return torch.randn(x.shape, generator=generators).to(x.device)
    return torch.stack([torch.randn(x.shape[1:], generator=each) for each in generators]).to(x.device)
