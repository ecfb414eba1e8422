"""The loaders of a run: over the caches, which are filled first, for training and for validation."""

from __future__ import annotations

import logging
from dataclasses import replace

from sfumato.config import Config
from sfumato.data.batch_sampler import BatchSampler
from sfumato.data.empty_masks import report_empty_masks
from sfumato.data.find.index import cache_folder
from sfumato.data.loader import Loader, LoaderSettings
from sfumato.data.plans import DataPlan
from sfumato.data.split import make_validation_sampler
from sfumato.data.variants import make_longest_variant
from sfumato.families.base import Family
from sfumato.families.encoding import describe_cut_captions
from sfumato.methods.base import Method
from sfumato.parallel.base import ParallelStrategy
from sfumato.plan import RunPlan
from sfumato.training.caching import fill_caches
from sfumato.training.preview_prompts import PreviewPrompts

log = logging.getLogger(__name__)
COUNTED = 5000  # captions whose tokens are counted before training


def make_loader(
    plan: RunPlan,
    model: Family,
    parallel: ParallelStrategy,
    *,
    prompts: PreviewPrompts | None = None,
    first_step: int = 0,
) -> Loader:
    """Fill the caches that are asked for and open the loader. No network stays loaded.

    prompts: of previews. first_step: the number of the step with the first data.
    """
    config, data, method = plan.config, plan.data, plan.method
    order = BatchSampler(
        data,
        seed=plan.seed,
        accumulation=config.loop.gradient_accumulation_steps,
        rank=parallel.rank,
        first_step=first_step,
    )
    report_cut_captions(config, data, model, method)
    if parallel.is_main:
        report_empty_masks(data, cache_folder(config), workers=config.loader.workers)
    caches = fill_caches(
        config,
        data,
        model,
        parallel,
        live_text=method.live_text,
        rewrite=method.rewrite_caption,
        prompts=prompts,
    )
    settings = LoaderSettings(
        max_train_steps=plan.total_steps,
        variants=config.cache.text_cache_variants if config.cache.cache_text_encoder_outputs else 0,
        text_dropout=text_dropout_rates(config, model),
        reference_dropout=config.dataset.reference_dropout_rate,
        control_latents=model.takes_control_latents,
        workers=config.loader.workers,
        skip_bad_images=config.dataset.on_bad_image == "skip",
    )
    return Loader(order, caches, settings)


def make_validation_loader(plan: RunPlan, loader: Loader, parallel: ParallelStrategy) -> Loader | None:
    """The held-out images from the same caches, without any dropout; None where there are none."""
    if not plan.data.validation:
        return None
    sampler = make_validation_sampler(plan.config, plan.data, rank=parallel.rank)
    return Loader(sampler, loader.caches, replace(loader.settings, text_dropout={}, reference_dropout=0.0))


def report_cut_captions(config: Config, data: DataPlan, model: Family, method: Method) -> None:
    """Warn of captions that are longer than the encoders read.

    At most some thousands are counted, evenly chosen: counting all of millions would take minutes.
    """
    subsets = [subset for dataset in (*data.datasets, *data.validation) for subset in dataset.subsets]
    total = sum(len(subset.items) for subset in subsets)
    every = -(-total // COUNTED)
    captions: dict[str, None] = {}  # each once, in order
    for subset in subsets:
        for row in range(0, len(subset.items), every):
            caption = subset.items.get_row(row).image.caption
            captions[method.rewrite_caption(make_longest_variant(caption, subset.settings.rules))] = None
    line = describe_cut_captions(model, list(captions), weighted=config.captions.weighted_captions)
    if line:
        log.warning("%s%s", line, f" (looked at one in {every})" if every > 1 else "")


def text_dropout_rates(config: Config, model: Family) -> dict[str, float]:
    """Text encoder -> chance to be left out, of those that this model has and whose rate it reads."""
    rates = config.captions.text_dropout
    return {part: rates[part] for part in model.text_parts if part in rates and f"{part}_dropout_rate" in model.options}
