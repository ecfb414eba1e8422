"""Filling one cache: of latents, of masks, of one encoder's features; with what its entries are for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from sfumato.config import Config
from sfumato.data.cache.entries import REFERENCE, CacheItem, ContentHashes, LatentKeys, Store, TensorCache
from sfumato.data.cache.filling import fill_latents, fill_text, list_latent_items
from sfumato.data.cache.references import describe_cache_use
from sfumato.data.cache.sharing import FillCounts, FillOptions
from sfumato.data.cache.store import DiskStore
from sfumato.data.caches import Caches, TextFeatures
from sfumato.data.masks import MaskKeys, fill_masks, list_mask_items
from sfumato.data.painted import PaintedKeys, fill_painted, list_painted_items
from sfumato.data.plans import DataPlan
from sfumato.families.base import Family
from sfumato.parallel.base import ParallelStrategy
from sfumato.track.progress_task import ProgressTask
from sfumato.training.cache_encoders import CacheEncoders
from sfumato.training.fingerprints import fingerprint_part, make_text_keys

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """Filling caches for one plan with one model."""

    config: Config
    data: DataPlan
    model: Family
    parallel: ParallelStrategy
    machine: tuple[int, int]

    @property
    def encoders(self) -> CacheEncoders:
        return CacheEncoders(config=self.config, model=self.model)

    def fill_image_caches(self, caches: Caches, store: Store) -> None:
        """The latents, and masks where images have any."""
        caches.latents = TensorCache(store)
        items = list_latent_items(self.data)
        caches.counts["latents"] = self.fill_latents(caches.latents, caches.latent_keys, items, "latents")
        if list_mask_items(self.data):
            caches.counts["masks"] = self.fill_masks(caches.latents, caches.mask_keys)
        if self.model.blueprint.inpaints:
            caches.painted_keys = PaintedKeys(latents=caches.latent_keys, masks=caches.mask_keys)
            caches.counts["masked images"] = self.fill_painted(caches.latents, caches.painted_keys)

    def fill_reference_cache(self, caches: Caches, items: Sequence[CacheItem]) -> None:
        """The latents of reference images, beside those of the images."""
        assert caches.latents is not None, "the latents come first"
        keys = replace(caches.latent_keys, role=REFERENCE)
        counts = self.fill_latents(caches.latents, keys, items, "reference images")
        caches.counts["reference images"] = counts

    def fill_text_cache(
        self, caches: Caches, part: str, store: Store, captions: Sequence[str], rewrite: Callable[[str], str]
    ) -> None:
        """The features of one encoder. captions: as the method rewrites them."""
        keys = make_text_keys(self.model, part, store, weighted=self.config.captions.weighted_captions)
        features = TextFeatures(cache=TensorCache(store), keys=keys, rewrite=rewrite)
        caches.text[part] = features
        caches.counts[f"text of {part}"] = self.fill_text(features, part, captions)

    def fill_latents(self, cache: TensorCache, names: LatentKeys, items: Sequence[CacheItem], kind: str) -> FillCounts:
        chunk = self.config.cache.vae_batch_size
        with self.start_progress(kind, "images") as progress:
            counts = fill_latents(
                cache,
                names,
                items,
                self.encoders.encode_references if names.role else self.encoders.encode_images,
                batch_size=chunk,
                workers=self.config.loader.workers,
                options=replace(
                    self.fill_options(kind, names.fingerprint, cache.store, progress),
                    refuse=self.encoders.refuse_missing("vae", "images"),
                ),
            )
        return self.report_counts(kind, counts, cache.store)

    def fill_masks(self, cache: TensorCache, names: MaskKeys) -> FillCounts:
        with self.start_progress("masks", "images") as progress:
            how = self.fill_options("masks", str(names.downscale), cache.store, progress)
            items = list_mask_items(self.data)
            counts = fill_masks(cache, names, items, workers=self.config.loader.workers, options=how)
        return self.report_counts("masks", counts, cache.store)

    def fill_painted(self, cache: TensorCache, keys: PaintedKeys) -> FillCounts:
        """The latents of images without what is painted."""
        kind = "masked images"
        with self.start_progress(kind, "images") as progress:
            counts = fill_painted(
                cache,
                keys,
                list_painted_items(self.data),
                self.encoders.encode_painted,
                batch_size=self.config.cache.vae_batch_size,
                workers=self.config.loader.workers,
                options=replace(
                    self.fill_options(kind, keys.latents.fingerprint, cache.store, progress),
                    refuse=self.encoders.refuse_missing("vae", "masked images"),
                ),
            )
        return self.report_counts(kind, counts, cache.store)

    def fill_text(self, features: TextFeatures, part: str, captions: Sequence[str]) -> FillCounts:
        kind, store = f"text of {part}", features.cache.store
        with self.start_progress(kind, "captions") as progress:
            counts = fill_text(
                features.cache,
                features.keys,
                captions,
                partial(self.encoders.encode_captions, part),
                batch_size=self.config.cache.text_encoder_batch_size or 1,
                options=replace(
                    self.fill_options(kind, features.keys.fingerprint, store, progress),
                    refuse=self.encoders.refuse_missing(part, "captions"),
                ),
            )
        return self.report_counts(kind, counts, store)

    def fill_options(self, kind: str, encoder: str, store: Store, progress: ProgressTask) -> FillOptions:
        writes = self.parallel.is_main and store.writable
        folder = store.folder if writes and isinstance(store, DiskStore) else None
        return FillOptions(
            rank=self.parallel.rank,
            processes=self.parallel.processes,
            machine=self.machine[0],
            machines=self.machine[1],
            meet=self.parallel.exchange,
            check=not self.config.cache.skip_cache_check,
            reference=describe_cache_use(self.data, kind, encoder, folder) if folder else None,
            progress=progress,
        )

    def start_progress(self, what: str, unit: str) -> ProgressTask:
        plain, visible = self.config.log.console_log_simple, self.parallel.is_main
        return ProgressTask(what, unit, plain=plain, visible=visible)

    def report_counts(self, kind: str, counts: FillCounts, store: Store) -> FillCounts:
        log.info("%s: %d found in the cache, %d encoded", kind, counts.existing, counts.created)
        if self.parallel.processes > 1 and not store.shared and counts.created:
            log.info("%s: each process encoded all of them; a cache on disk would have shared the work", kind)
        return counts


def make_latent_keys(model: Family, hashes: Store) -> LatentKeys:
    return LatentKeys(
        fingerprint=fingerprint_part(model, "vae", hashes),
        dtype=torch.promote_types(model.parts["vae"].dtype, torch.float32),
        hashes=ContentHashes(hashes),
    )
