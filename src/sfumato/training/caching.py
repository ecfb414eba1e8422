"""Filling the caches of what does not train: latents, masks, text; each entry is made once."""

from __future__ import annotations

from collections.abc import Callable, Collection

from sfumato.config import Config
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.caches import Caches
from sfumato.data.find.index import cache_folder
from sfumato.data.masks import MaskKeys
from sfumato.data.plans import DataPlan
from sfumato.data.references import list_reference_items
from sfumato.data.variants import list_captions_to_cache
from sfumato.errors import Problems
from sfumato.families.base import Family
from sfumato.parallel.base import ParallelStrategy
from sfumato.training.cache_job import CacheJob, make_latent_keys
from sfumato.training.preview_prompts import PreviewPrompts, remember_prompts


def fill_caches(
    config: Config,
    data: DataPlan,
    model: Family,
    parallel: ParallelStrategy,
    *,
    live_text: Collection[str] = (),
    rewrite: Callable[[str], str] = str,
    prompts: PreviewPrompts | None = None,
    machine: tuple[int, int] = (0, 1),
) -> Caches:
    """Make what is missing of the caches that are asked for, with one network in memory at a time.

    A network that has nothing to encode is not loaded. live_text: encoders that train, which are not cached. rewrite:
    the method's change of a caption before encoding. prompts: of previews, encoded with the captions. machine: which
    of how many machines without a common store this is.
    """
    cache = config.cache
    disk = open_store(config) if cache.cache_latents_to_disk or cache.cache_text_encoder_outputs_to_disk else None
    latents = disk if disk and cache.cache_latents_to_disk else MemoryStore()
    text = disk if disk and cache.cache_text_encoder_outputs_to_disk else MemoryStore()
    task = CacheJob(config=config, data=data, model=model, parallel=parallel, machine=machine)
    keys = make_latent_keys(model, latents)
    caches = Caches(latent_keys=keys, mask_keys=MaskKeys(downscale=model.latents.downscale, hashes=keys.hashes))

    def fill_part(part: str) -> None:
        if part == "vae":
            task.fill_image_caches(caches, latents)
            if references := list_reference_items(data, control=model.takes_control_latents):
                task.fill_reference_cache(caches, references)
        else:
            captions = list_captions_to_cache(data, variants=cache.text_cache_variants)
            task.fill_text_cache(caches, part, text, [rewrite(caption) for caption in captions], rewrite)
            if prompts is not None:
                remember_prompts(prompts, part, caches.text[part].cache)
        model.parts[part].unload()

    wanted = cache.list_cached_parts(model.text_parts, live_text)
    absent, problems = model.blueprint.cached_parts, Problems()
    for part in (part for part in wanted if part in absent):  # first, since it may be refused
        with problems.catch():
            fill_part(part)
    problems.raise_all()
    for part in (part for part in wanted if part not in absent):
        fill_part(part)
    return caches


def open_store(config: Config) -> DiskStore:
    return DiskStore(cache_folder(config))
