"""A batch's latents: from the cache, or from the autoencoder exactly as the cache makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.data.batch import Batch
from sfumato.data.cache.entries import make_not_finite_error
from sfumato.data.loader import Loader
from sfumato.families.encoding import encode_images
from sfumato.training.run import Run


def load_latents(run: Run, batch: Batch) -> Tensor:
    """(B, C, h, w) on the device."""
    if batch.latents is not None:
        return batch.latents.to(run.device, non_blocking=True)
    assert batch.pixels is not None
    size = run.config.cache.vae_batch_size
    return encode_images(run.model, batch.pixels, batch.entry_seeds.tolist(), vae_batch_size=size)


def check_latents(latents: Tensor, batch: Batch, loader: Loader) -> None:
    """UserError that names the images whose latents are not finite, of a batch of this loader; waits for the device."""
    finite = torch.isfinite(latents).flatten(1).all(1).cpu()
    if not finite.all():
        raise make_not_finite_error(loader.sampler.find_images(batch.ids[~finite].tolist()))
