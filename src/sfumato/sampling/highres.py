"""Hires fix: a first stage at a smaller size, whose result is enlarged and denoised again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from sfumato.families.base import Family
from sfumato.families.encoding import decode_latents, encode_images
from sfumato.sampling.latent_upscaler import load_upscaler, upscale_images
from sfumato.sampling.request import ImageRequest

SIZE_STEP = 32  # pixels, of the first stage


def make_first_stage(request: ImageRequest, model: Family) -> ImageRequest:
    """The request at the smaller size, with the first stage's steps."""
    settings = request.highres
    assert settings is not None
    step = max(SIZE_STEP, model.sampling.size_multiple)
    width, height = (
        max(step, int(side * settings.highres_fix_scale + 0.5) // step * step)
        for side in (request.width, request.height)
    )
    start = request.start
    if start is not None:
        start = replace(start, strength=settings.highres_fix_strength or start.strength)
    return replace(request, width=width, height=height, steps=settings.highres_fix_steps, start=start, highres=None)


def enlarge(model: Family, latents: Tensor, request: ImageRequest) -> Tensor:
    """The first stage's latents at the size of the image: interpolated, or through the autoencoder."""
    settings = request.highres
    assert settings is not None
    if settings.highres_fix_latents_upscaling:
        size = (request.height // model.latents.downscale, request.width // model.latents.downscale)
        return F.interpolate(latents, size=size, mode="bilinear")
    images = decode_latents(model, latents).clamp(-1, 1)
    if settings.highres_fix_upscaler:
        network = load_upscaler(Path(settings.highres_fix_upscaler))
        return upscale_images(model, network, images, (request.height, request.width))
    larger = F.interpolate(images, size=(request.height, request.width), mode="bicubic", antialias=True).clamp(-1, 1)
    return encode_images(model, larger, None, vae_batch_size=1).to(model.device)
