"""From a data plan to batches: the caches of what does not train, filled once, and the loader over them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from sfumato.config import Config
from sfumato.data.cache.entries import (
    ContentHashes,
    Counts,
    Filling,
    LatentNames,
    Store,
    TensorCache,
    TextNames,
    fill_latents,
    fill_text,
    latent_places,
)
from sfumato.data.cache.references import Use
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.find.index import default_cache_dir
from sfumato.data.loader import Loader, TextFeatures
from sfumato.data.masks import MaskNames, fill_masks, mask_places
from sfumato.data.order import Order
from sfumato.data.plans import DataPlan, SubsetPlan
from sfumato.data.split import validation_order
from sfumato.data.variants import captions_to_cache, longest_form
from sfumato.families.base import Family
from sfumato.families.encoding import cut_captions, encode_captions, encode_images, fingerprint
from sfumato.methods.base import Method
from sfumato.track.jobs import Job

log = logging.getLogger(__name__)
COUNTED = 5000  # captions whose tokens are counted before training


def make_loader(
    config: Config, data: DataPlan, total: int, model: Family, method: Method, at: PartialState, *, began: int = 0
) -> Loader:
    """Fill the caches that are asked for and open the loader; networks whose output is cached are put away.

    began: what the step with the first data is called.
    """
    assert config.loop.seed is not None
    accumulation = config.loop.gradient_accumulation_steps
    order = Order(data, seed=config.loop.seed, accumulation=accumulation, rank=at.process_index, began=began)
    tell_of_cut_captions(config, data, model, method)
    caches = fill(config, data, model, at, live_text=method.live_text, rewrite=method.caption)
    return Loader(
        order,
        names=caches.names,
        masks=caches.masks,
        max_train_steps=total,
        latents=caches.latents,
        text=caches.text,
        variants=config.cache.text_cache_variants if config.cache.cache_text_encoder_outputs else 0,
        text_dropout=text_dropout(config, model),
        workers=workers_of(config),
    )


def make_held_out(config: Config, data: DataPlan, loader: Loader, at: PartialState) -> Loader | None:
    """The held-out images out of the same caches, without any dropout of text; None where there are none."""
    if not data.validation:
        return None
    return Loader(
        validation_order(config, data, rank=at.process_index),
        names=loader.names,
        masks=loader.masks,
        max_train_steps=loader.max_train_steps,
        latents=loader.latents,
        text=loader.text,
        variants=loader.variants,
        workers=loader.workers,
    )


def fill(
    config: Config,
    data: DataPlan,
    model: Family,
    at: PartialState,
    *,
    live_text: Collection[str] = (),
    rewrite: Callable[[str], str] = str,
    machine: tuple[int, int] = (0, 1),
) -> Caches:
    """Make what is missing of the caches that are asked for; networks whose output is cached are put away.

    live_text: encoders that train and are left out. rewrite: what the method makes of a caption before it is encoded.
    machine: which of how many machines without a common store this is.
    """
    cache = config.cache
    disk = open_store(config) if cache.cache_latents_to_disk or cache.cache_text_encoder_outputs_to_disk else None
    on_disk = disk if disk and cache.cache_latents_to_disk else MemoryStore()
    task = Task(config=config, data=data, model=model, at=at, machine=machine)
    names = latent_names(model, on_disk)
    masks = MaskNames(downscale=model.latents.downscale, hashes=names.hashes)
    caches = Caches(names=names, masks=masks)
    if cache.cache_latents:
        caches.latents = TensorCache(on_disk)
        caches.counts["latents"] = task.latents(caches.latents, names)
        if mask_places(data):
            caches.counts["masks"] = task.masks(caches.latents, masks)
        put_away(model.vae, config)
    if cache.cache_text_encoder_outputs:
        store = disk if disk and cache.cache_text_encoder_outputs_to_disk else MemoryStore()
        captions = [rewrite(caption) for caption in captions_to_cache(data, variants=cache.text_cache_variants)]
        for part in (part for part in model.text_parts if part not in live_text):
            names = text_names(config, model, part)
            caches.text[part] = TextFeatures(cache=TensorCache(store), names=names, rewrite=rewrite)
            caches.counts[f"text of {part}"] = task.text(caches.text[part], part, captions)
            put_away(model.parts[part].module, config)
    return caches


def put_away(module: nn.Module, config: Config) -> None:
    """A network whose output is cached leaves the device; its weights go altogether where no preview will ask."""
    module.to("cpu" if config.samples.sample_prompts else "meta")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Filling caches for one plan with one model."""

    config: Config
    data: DataPlan
    model: Family
    at: PartialState
    machine: tuple[int, int]

    def latents(self, cache: TensorCache, names: LatentNames) -> Counts:
        chunk = self.config.cache.vae_batch_size
        with self.job("latents", "images") as progress:
            counts = fill_latents(
                cache,
                names,
                latent_places(self.data),
                lambda pixels, seeds: encode_images(self.model, pixels, seeds, vae_batch_size=chunk),
                batch_size=chunk,
                workers=workers_of(self.config),
                how=self.how("latents", names.fingerprint, cache.store, progress),
            )
        return self.told("latents", counts, cache.store)

    def masks(self, cache: TensorCache, names: MaskNames) -> Counts:
        with self.job("masks", "images") as progress:
            how = self.how("masks", str(names.downscale), cache.store, progress)
            counts = fill_masks(cache, names, mask_places(self.data), workers=workers_of(self.config), how=how)
        return self.told("masks", counts, cache.store)

    def text(self, features: TextFeatures, part: str, captions: Sequence[str]) -> Counts:
        kind, store = f"text of {part}", features.cache.store
        with self.job(kind, "captions") as progress:
            counts = fill_text(
                features.cache,
                features.names,
                captions,
                partial(encode_captions, self.model, part, weighted=self.config.captions.weighted_captions),
                batch_size=self.config.cache.text_encoder_batch_size or 1,
                how=self.how(kind, features.names.fingerprint, store, progress),
            )
        return self.told(kind, counts, store)

    def how(self, kind: str, encoder: str, store: Store, progress: Job) -> Filling:
        folder = store.folder if self.at.is_main_process and isinstance(store, DiskStore) else None
        return Filling(
            rank=self.at.process_index,
            processes=self.at.num_processes,
            machine=self.machine[0],
            machines=self.machine[1],
            check=not self.config.cache.skip_cache_check,
            use=use_of(self.data, kind, encoder, folder) if folder else None,
            progress=progress,
        )

    def job(self, what: str, unit: str) -> Job:
        return Job(what, unit, plain=self.config.log.console_log_simple, visible=self.at.is_main_process)

    def told(self, kind: str, counts: Counts, store: Store) -> Counts:
        log.info("%s: %d found in the cache, %d made", kind, counts.found, counts.encoded)
        if self.at.num_processes > 1 and not store.shared and counts.encoded:
            log.info("%s: each process made all of them; a cache on disk would have shared the work", kind)
        return counts


def tell_of_cut_captions(config: Config, data: DataPlan, model: Family, method: Method) -> None:
    """Some thousands of captions, evenly chosen: counting all of millions would take minutes."""
    subsets = [subset for dataset in (*data.datasets, *data.validation) for subset in dataset.subsets]
    total = sum(len(subset.items) for subset in subsets)
    every = -(-total // COUNTED)
    chosen = ((subset, place) for subset in subsets for place in range(0, len(subset.items), every))
    some = dict.fromkeys(longest_form(subset.items.row(place), subset) for subset, place in chosen)
    line = cut_captions(model, [method.caption(each) for each in some], weighted=config.captions.weighted_captions)
    if line:
        log.warning("%s%s", line, f" (looked at one in {every})" if every > 1 else "")


def text_dropout(config: Config, model: Family) -> dict[str, float]:
    """Text encoder -> chance to be left out, of those that this model has and whose rate it reads."""
    rates = config.captions.text_dropout
    return {part: rates[part] for part in model.text_parts if part in rates and f"{part}_dropout_rate" in model.options}


def latent_names(model: Family, hashes: Store) -> LatentNames:
    return LatentNames(
        fingerprint=fingerprint(model.vae, type(model).name),
        dtype=torch.promote_types(next(model.vae.parameters()).dtype, torch.float32),
        hashes=ContentHashes(hashes),
    )


def text_names(config: Config, model: Family, part: str) -> TextNames:
    facts = (part, model.text_fingerprint(part), *(("emphasis",) if config.captions.weighted_captions else ()))
    return TextNames(fingerprint=fingerprint(model.parts[part].module, *facts))


def use_of(data: DataPlan, kind: str, encoder: str, cache: Path) -> Use:
    """What the entries are for."""
    datasets = (*data.datasets, *data.validation)
    places = {place for dataset in datasets for subset in dataset.subsets for place in places_of(subset)}
    sizes = {f"{dataset.settings.resolution[0]}x{dataset.settings.resolution[1]}" for dataset in datasets}
    return Use(
        cache=cache,
        kind=kind,
        places=tuple(sorted(places)),
        encoder=encoder,
        sizes=tuple(sorted(sizes)) if kind in ("latents", "masks") else (),
    )


def places_of(subset: SubsetPlan) -> set[str]:
    """The folders and archives that the pictures lie in."""
    pictures = subset.items.pictures
    if "" in pictures.origins:
        return {os.path.dirname(path) for path in pictures.paths()}  # noqa: PTH120 -- strings, for many thousands
    return {os.path.abspath(origin) for origin in pictures.origins}  # noqa: PTH100


def open_store(config: Config) -> DiskStore:
    return DiskStore(cache_folder(config))


def cache_folder(config: Config) -> Path:
    return config.cache.cache_dir or default_cache_dir()


def workers_of(config: Config) -> int:
    return min(config.loader.max_data_loader_n_workers, os.cpu_count() or 1)


@dataclass(kw_only=True)
class Caches:
    """What was filled."""

    names: LatentNames
    masks: MaskNames
    latents: TensorCache | None = None
    text: dict[str, TextFeatures] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)  # "latents", "masks", "text of clip_l"

    def close(self) -> None:
        """Let go of the stores; nothing can be read any more."""
        caches = [self.latents, *(features.cache for features in self.text.values())]
        for store in {id(cache.store): cache.store for cache in caches if cache is not None}.values():
            store.close()
