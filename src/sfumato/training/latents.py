"""A batch's latents: from the cache, or from the autoencoder exactly as the cache makes them; and its other images."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from sfumato.common.seeds import python_random
from sfumato.config import Config
from sfumato.data.batch import CONTROL, CONTROL_MASK, INPAINT, Batch, ImageInput, is_reference
from sfumato.data.cache.filling import make_not_finite_error
from sfumato.data.inpaint_masks import draw_mask
from sfumato.data.loader import Loader
from sfumato.data.painted import enlarge_mask, says_what_is_painted
from sfumato.families.base import Family
from sfumato.families.encoding import encode_images, encode_unpainted, join_inpaint


class LatentSource(Protocol):
    """What latents are made with: a run, or a checkpoint that is measured without one."""

    @property
    def config(self) -> Config: ...

    @property
    def model(self) -> Family: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def seed(self) -> int:
        """Of the run."""
        ...


def load_latents(run: LatentSource, batch: Batch) -> Tensor:
    """(B, C, h, w) on the device; zeros for samples without an image."""
    if batch.latents is not None:
        return batch.latents.to(run.device, non_blocking=True)
    if batch.concepts is not None:
        height, width = (int(side) // run.model.latents.downscale for side in batch.sizes.target[0])
        return torch.zeros(len(batch.concepts), run.model.latents.channels, height, width, device=run.device)
    assert batch.pixels is not None
    size = run.config.cache.vae_batch_size
    return encode_images(run.model, batch.pixels, batch.entry_seeds.tolist(), vae_batch_size=size)


def load_other_images(run: LatentSource, batch: Batch) -> Batch:
    """The batch with its reference images, what a model for inpainting sees, as latents on the device, and masks."""
    return load_control_mask(run, load_inpaint(run, load_references(run, batch)))


def load_inpaint(run: LatentSource, batch: Batch) -> Batch:
    """What a model for inpainting sees."""
    if not run.model.blueprint.inpaints:
        return batch
    masks = choose_masks(run, batch)
    cached = batch.extras.images.get(INPAINT)
    if cached is None:
        assert batch.pixels is not None, "the plan refuses cached latents of images without masks"
        seeds, size = batch.entry_seeds.tolist(), run.config.cache.vae_batch_size
        latents = encode_unpainted(run.model, batch.pixels, masks, seeds, vae_batch_size=size)
    else:
        assert cached.latents is not None
        latents = cached.latents.to(run.device, non_blocking=True)
    return with_image(batch, INPAINT, ImageInput(latents=join_inpaint(run.model, masks, latents)))


def load_control_mask(run: LatentSource, batch: Batch) -> Batch:
    """Beside the control image the mask, where what trains reads one."""
    if not run.model.takes_control_mask or CONTROL not in batch.extras.images:
        return batch
    return with_image(batch, CONTROL_MASK, ImageInput(pixels=choose_masks(run, batch)))


def with_image(batch: Batch, role: str, image: ImageInput) -> Batch:
    return replace(batch, extras=replace(batch.extras, images={**batch.extras.images, role: image}))


def choose_masks(run: LatentSource, batch: Batch) -> Tensor:
    """(B, 1, H, W), 1 where something is painted.

    The loss mask of a sample that has one, else a mask that is a function of the sample's id.
    """
    height, width = batch.sizes.target[0].tolist()
    masks: list[Tensor] = []
    for row, sample in enumerate(batch.ids.tolist()):
        own = None if batch.mask is None else batch.mask[row].cpu().float()
        if own is None or not says_what_is_painted(own):
            drawn = draw_mask(python_random(run.seed, "inpaint mask", sample), (width, height))
            masks.append(torch.from_numpy(drawn)[None])
        else:
            masks.append(enlarge_mask(own, height, width))
    return torch.stack(masks)


def load_references(run: LatentSource, batch: Batch) -> Batch:
    """The batch with its reference images as latents on the device, and the control images where these are latents."""
    images = dict(batch.extras.images)
    for role, image in batch.extras.images.items():
        as_latents = is_reference(role) or (role == CONTROL and run.model.takes_control_latents)
        images[role] = load_reference(run, image) if as_latents else image
    return replace(batch, extras=replace(batch.extras, images=images)) if images else batch


def load_reference(run: LatentSource, image: ImageInput) -> ImageInput:
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
