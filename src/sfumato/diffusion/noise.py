"""What noise is made of: (one sample's generator, its latent (C, h, w)) -> noise, float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from sfumato.config import NoiseOptions

Noise = Callable[[Generator, Tensor], Tensor]


def make_noise(options: NoiseOptions) -> Noise:
    """Gaussian noise, with an offset for whole channels and coarser layers where the options ask for them."""

    def noise(generator: Generator, latent: Tensor) -> Tensor:
        drawn = gaussian(generator, latent.shape)
        if options.noise_offset:
            drawn = drawn + offset(generator, latent, options)
        if options.multires_noise_iterations:
            drawn = multires(drawn, generator, options.multires_noise_iterations, options.multires_noise_discount)
        return drawn

    return noise


def make_perturb(options: NoiseOptions) -> Noise | None:
    """Noise -> what the model's input gets instead: more of it (Ning et al. 2023, sec. 4)."""
    if not options.ip_noise_gamma:
        return None
    gamma = options.ip_noise_gamma

    def perturb(generator: Generator, noise: Tensor) -> Tensor:
        strength = share(generator, random=options.ip_noise_gamma_random_strength) * gamma
        return noise + strength * gaussian(generator, noise.shape)

    return perturb


def gaussian(generator: Generator, shape: Sequence[int]) -> Tensor:
    """Drawn on the CPU in float32, so that every device sees the same noise."""
    return torch.randn(tuple(shape), generator=generator)


def share(generator: Generator, *, random: bool) -> Tensor:
    return torch.rand((), generator=generator) if random else torch.ones(())


def offset(generator: Generator, latent: Tensor, options: NoiseOptions) -> Tensor:
    """(C, 1, 1): one number for each channel, so that a picture's brightness can be learned.

    The strength may be drawn anew for each sample, and follow how far the latent's channels lie from zero.
    """
    strength = share(generator, random=options.noise_offset_random_strength) * (options.noise_offset or 0.0)
    if options.adaptive_noise_scale:
        mean = latent.float().mean((1, 2), keepdim=True).abs().cpu()
        strength = (strength + options.adaptive_noise_scale * mean).clamp(min=0)
    return strength * gaussian(generator, (len(latent), 1, 1))


def multires(noise: Tensor, generator: Generator, iterations: int, discount: float) -> Tensor:
    """Noise at ever coarser sizes, added with ever less weight; the whole brought back to deviation 1."""
    return with_layers(
        noise,
        [2 + 2 * torch.rand((), generator=generator).item() for _ in range(iterations)],
        lambda shape: gaussian(generator, shape),
        discount,
    )


def with_layers(
    noise: Tensor, ratios: Sequence[float], draw: Callable[[Sequence[int]], Tensor], discount: float
) -> Tensor:
    """(C, h, w): layer i has 1 / ratio^i of each side and the weight discount^i; the last is one pixel thin."""
    channels, height, width = noise.shape
    for i, ratio in enumerate(ratios):
        size = (max(1, int(height / ratio**i)), max(1, int(width / ratio**i)))
        layer = draw((channels, *size))[None]
        noise = noise + discount**i * torch.nn.functional.interpolate(layer, (height, width), mode="bilinear")[0]
        if min(size) == 1:
            break
    return noise / noise.std()
