"""A batch's latents: from the cache, or from the autoencoder exactly as the cache makes them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sfumato.data.batch import CONTROL, Batch, ImageInput, is_reference
from sfumato.data.cache.entries import make_not_finite_error
from sfumato.data.loader import Loader
from sfumato.families.encoding import encode_images
from sfumato.training.run import Run


def load_latents(run: Run, batch: Batch) -> Tensor:
    """(B, C, h, w) on the device; zeros for samples without an image."""
    if batch.latents is not None:
        return batch.latents.to(run.device, non_blocking=True)
    if batch.concepts is not None:
        height, width = (int(side) // run.model.latents.downscale for side in batch.sizes.target[0])
        return torch.zeros(len(batch.concepts), run.model.latents.channels, height, width, device=run.device)
    assert batch.pixels is not None
    size = run.config.cache.vae_batch_size
    return encode_images(run.model, batch.pixels, batch.entry_seeds.tolist(), vae_batch_size=size)


def load_references(run: Run, batch: Batch) -> Batch:
    """The batch with its reference images as latents on the device, and the control images where these are latents."""
    images = dict(batch.extras.images)
    for role, image in batch.extras.images.items():
        as_latents = is_reference(role) or (role == CONTROL and run.model.takes_control_latents)
        images[role] = load_reference(run, image) if as_latents else image
    return replace(batch, extras=replace(batch.extras, images=images)) if images else batch


def load_reference(run: Run, image: ImageInput) -> ImageInput:
    if image.latents is not None:
        return replace(image, latents=image.latents.to(run.device, non_blocking=True))
    assert image.pixels is not None
    size = run.config.cache.vae_batch_size
    return replace(image, pixels=None, latents=encode_images(run.model, image.pixels, None, vae_batch_size=size))


def check_latents(latents: Tensor, batch: Batch, loader: Loader) -> None:
    """UserError that names the images whose latents are not finite, of a batch of this loader; waits for the device."""
    finite = torch.isfinite(latents).flatten(1).all(1).cpu()
    if not finite.all():
        raise make_not_finite_error(loader.sampler.find_images(batch.ids[~finite].tolist()))
