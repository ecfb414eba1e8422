"""A batch's latents: from the cache, or from the autoencoder exactly as the cache makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.data.batch import Batch
from sfumato.data.cache.entries import make_not_finite_error
from sfumato.data.loader import Loader
from sfumato.families.encoding import encode_images
from sfumato.training.run import Run


def load_latents(run: Run, batch: Batch, source: Loader | None = None) -> Tensor:
    """(B, C, h, w) on the device. UserError that names the images where a latent is not finite.

    source: the loader that the batch came from, where that is not training's.
    """
    if batch.latents is not None:
        return batch.latents.to(run.device, non_blocking=True)
    assert batch.pixels is not None
    size = run.config.cache.vae_batch_size
    latents = encode_images(run.model, batch.pixels, batch.entry_seeds.tolist(), vae_batch_size=size)
    if not torch.isfinite(latents).all():
        bad = batch.ids[~torch.isfinite(latents).flatten(1).all(1).cpu()]
        raise make_not_finite_error((source or run.loader).sampler.find_images(bad.tolist()))
    return latents
