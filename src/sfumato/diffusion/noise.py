"""Noise functions: (one sample's generator, its latent (C, h, w)) -> noise (C, h, w), float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from sfumato.config import NoiseOptions

Noise = Callable[[Generator, Tensor], Tensor]


def make_noise(options: NoiseOptions) -> Noise:
    """Gaussian noise, plus an offset per channel and coarser layers where the options enable them."""

    def draw(generator: Generator, latent: Tensor) -> Tensor:
        noise = draw_gaussian(generator, latent.shape)
        if options.noise_offset:
            noise = noise + draw_offset(generator, latent, options)
        if options.multires_noise_iterations:
            noise = add_multires(noise, generator, options.multires_noise_iterations, options.multires_noise_discount)
        return noise

    return draw


def make_perturb(options: NoiseOptions) -> Noise | None:
    """Noise -> the stronger noise that only the model's input gets (Ning et al. 2023, sec. 4)."""
    if not options.ip_noise_gamma:
        return None
    gamma = options.ip_noise_gamma

    def perturb(generator: Generator, noise: Tensor) -> Tensor:
        strength = draw_strength(generator, random=options.ip_noise_gamma_random_strength) * gamma
        return noise + strength * draw_gaussian(generator, noise.shape)

    return perturb


def draw_gaussian(generator: Generator, shape: Sequence[int]) -> Tensor:
    """float32 on the CPU, so that every device sees the same noise."""
    return torch.randn(tuple(shape), generator=generator)


def draw_strength(generator: Generator, *, random: bool) -> Tensor:
    """(), uniform in [0, 1) where `random`, otherwise 1."""
    return torch.rand((), generator=generator) if random else torch.ones(())


def draw_offset(generator: Generator, latent: Tensor, options: NoiseOptions) -> Tensor:
    """(C, 1, 1): one number per channel, so that an image's brightness can be learned.

    The strength is drawn per sample with --noise_offset_random_strength; --adaptive_noise_scale adds the absolute mean
    of the latent's channel times that scale.
    """
    strength = draw_strength(generator, random=options.noise_offset_random_strength) * (options.noise_offset or 0.0)
    if options.adaptive_noise_scale:
        mean = latent.float().mean((1, 2), keepdim=True).abs().cpu()
        strength = (strength + options.adaptive_noise_scale * mean).clamp(min=0)
    return strength * draw_gaussian(generator, (len(latent), 1, 1))


def add_multires(noise: Tensor, generator: Generator, iterations: int, discount: float) -> Tensor:
    """Add noise of coarser and coarser sizes with smaller and smaller weights; rescale to standard deviation 1."""
    return add_layers(
        noise,
        [2 + 2 * torch.rand((), generator=generator).item() for _ in range(iterations)],
        lambda shape: draw_gaussian(generator, shape),
        discount,
    )


def add_layers(
    noise: Tensor, ratios: Sequence[float], draw: Callable[[Sequence[int]], Tensor], discount: float
) -> Tensor:
    """(C, h, w): layer i has 1 / ratio^i of each side and the weight discount^i; stops at a side of one pixel."""
    channels, height, width = noise.shape
    for i, ratio in enumerate(ratios):
        size = (max(1, int(height / ratio**i)), max(1, int(width / ratio**i)))
        layer = draw((channels, *size))[None]
        noise = noise + discount**i * torch.nn.functional.interpolate(layer, (height, width), mode="bilinear")[0]
        if min(size) == 1:
            break
    return noise / noise.std()
