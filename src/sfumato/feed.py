"""From a data plan to batches: the caches of what does not train, filled once, and the loader over them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from accelerate import PartialState

from sfumato.config import Config
from sfumato.data.cache import (
    ContentHashes,
    Counts,
    LatentNames,
    TensorCache,
    TextNames,
    fill_latents,
    fill_text,
    latent_places,
)
from sfumato.data.index import default_cache_dir
from sfumato.data.loader import Loader, TextFeatures
from sfumato.data.masks import MaskNames, fill_masks, mask_places
from sfumato.data.order import Order
from sfumato.data.plans import DataPlan
from sfumato.data.store import DiskStore, MemoryStore
from sfumato.data.summary import captions_to_cache
from sfumato.encode import encode_captions, encode_images, fingerprint
from sfumato.errors import Problems
from sfumato.families.base import Family
from sfumato.methods.base import Method

log = logging.getLogger(__name__)
QUIET_SECONDS = 10.0  # between two lines about a long job


def make_loader(config: Config, data: DataPlan, total: int, model: Family, method: Method, at: PartialState) -> Loader:
    """Fill the caches that are asked for and open the loader; encoders that are cached leave the device."""
    assert config.loop.seed is not None
    workers = min(config.loader.max_data_loader_n_workers, os.cpu_count() or 1)
    accumulation = config.loop.gradient_accumulation_steps
    order = Order(data, seed=config.loop.seed, accumulation=accumulation, rank=at.process_index)
    names = LatentNames(
        fingerprint=fingerprint(model.vae, type(model).name),
        dtype=torch.promote_types(next(model.vae.parameters()).dtype, torch.float32),
        hashes=ContentHashes(open_store(config) if config.cache.cache_latents_to_disk else MemoryStore()),
    )
    masks = MaskNames(downscale=model.latents.downscale, hashes=names.hashes)
    latents = cached_latents(config, data, names, masks, model, at, workers) if config.cache.cache_latents else None
    text = cached_text(config, data, model, method, at) if config.cache.cache_text_encoder_outputs else {}
    return Loader(
        order,
        names=names,
        masks=masks,
        max_train_steps=total,
        latents=latents,
        text=text,
        text_dropout=text_dropout(config, model),
        workers=workers,
    )


def text_dropout(config: Config, model: Family) -> dict[str, float]:
    """Text encoder -> chance to be left out, of those that this model has and whose rate it reads."""
    rates = config.captions.text_dropout
    return {part: rates[part] for part in model.text_parts if part in rates and f"{part}_dropout_rate" in model.options}


def open_store(config: Config) -> DiskStore:
    return DiskStore(config.cache.cache_dir or default_cache_dir())


def cached_latents(
    config: Config,
    data: DataPlan,
    names: LatentNames,
    masks: MaskNames,
    model: Family,
    at: PartialState,
    workers: int,
) -> TensorCache:
    """Every picture's latents and mask, from the cache or made now; then the autoencoder waits in main memory."""
    chunk = config.cache.vae_batch_size
    cache = TensorCache(open_store(config) if config.cache.cache_latents_to_disk else MemoryStore())
    counts = fill_latents(
        cache,
        names,
        latent_places(data),
        lambda pixels, seeds: encode_images(model, pixels, seeds, vae_batch_size=chunk),
        batch_size=chunk,
        workers=workers,
        rank=at.process_index,
        processes=at.num_processes,
        progress=telling("latents"),
    )
    told("latents", counts)
    places = mask_places(data)
    if places:
        counts = fill_masks(
            cache,
            masks,
            places,
            workers=workers,
            rank=at.process_index,
            processes=at.num_processes,
            progress=telling("masks"),
        )
        told("masks", counts)
    model.vae.to("cpu")
    return cache


def cached_text(
    config: Config, data: DataPlan, model: Family, method: Method, at: PartialState
) -> dict[str, TextFeatures]:
    """The features of every encoder that does not train."""
    problems = Problems()
    captions = [method.caption(caption) for caption in captions_to_cache(data, problems)]
    problems.raise_all()
    found: dict[str, TextFeatures] = {}
    for part in model.text_parts:
        if part in method.live_text:
            continue
        facts = (part, model.text_fingerprint(part), *(("emphasis",) if config.captions.weighted_captions else ()))
        names = TextNames(fingerprint=fingerprint(model.parts[part].module, *facts))
        to_disk = config.cache.cache_text_encoder_outputs_to_disk
        cache = TensorCache(open_store(config) if to_disk else MemoryStore())
        counts = fill_text(
            cache,
            names,
            captions,
            partial(encode_captions, model, part, weighted=config.captions.weighted_captions),
            rank=at.process_index,
            processes=at.num_processes,
            progress=telling(f"text features of {part}"),
        )
        told(f"text features of {part}", counts)
        found[part] = TextFeatures(cache=cache, names=names)
        model.parts[part].module.to("cpu")
    return found


def telling(what: str) -> Callable[[int, int], None]:
    """A line now and then about a job that takes long."""
    began = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= QUIET_SECONDS:
            last = now
            log.info("%s: %d of %d, %.1f a second", what, done, total, done / (now - began))

    return tell


def told(what: str, counts: Counts) -> None:
    log.info("%s: %d found in the cache, %d made", what, counts.found, counts.encoded)
