"""Which images are held out for validation; none is ever in both halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from sfumato.config import Config
from sfumato.data.find.image_table import Column
from sfumato.data.find.policy import some
from sfumato.data.find.report import Report
from sfumato.data.find.settings import SubsetSettings
from sfumato.data.order import HeldOut
from sfumato.data.plans import DataPlan, DatasetPlan
from sfumato.errors import Problems


def validation_seed(config: Config) -> int:
    """--validation_seed, or --seed; 0 where neither is given, never a drawn one: a resumed run holds out the same."""
    if config.validation.validation_seed is not None:
        return config.validation.validation_seed
    drawn = config.source("seed") == "default"
    return 0 if drawn or config.loop.seed is None else config.loop.seed


def validation_order(config: Config, plan: DataPlan, *, rank: int = 0) -> HeldOut:
    """The order in which one validation goes through them."""
    return HeldOut(plan, seed=validation_seed(config), most=config.validation.max_validation_steps, rank=rank)


def still(subset: SubsetSettings) -> SubsetSettings:
    """How held-out images are shown: no augmentation, every caption whole and in order."""
    rules = replace(
        subset.rules,
        shuffle_caption=False,
        token_warmup_step=0,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
    )
    images = replace(subset.images, flip_aug=False, color_aug=False, random_crop=False, face_crop_aug_range=None)
    return replace(subset, rules=rules, images=images)


def halves(count: int, subset: SubsetSettings, seed: int) -> tuple[Column, Column]:
    """Places of the training and of the validation images; of regularisation images none is held out.

    seed: where the subset has none of its own. Depends on nothing else, so a folder that several datasets use is
    split alike in all of them.
    """
    if subset.validation_split == 0 or subset.is_reg:
        return np.arange(count), np.zeros(0, np.int64)
    own = seed if subset.validation_seed is None else subset.validation_seed
    kept, held = held_out(count, subset.validation_split, own)
    return np.array(kept, np.int64), np.array(held, np.int64)


def held_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the training and of the validation images: the last round(count * share) of a shuffle are held out.

    The field's rule for which images are held out, without its overlap of one image in many cases.
    """
    places = list(range(count))
    Random(seed).shuffle(places)
    cut = count - round(count * share)
    return sorted(places[:cut]), places[cut:]


def refuse_overlap(training: Sequence[DatasetPlan], validation: Sequence[DatasetPlan], problems: Problems) -> None:
    """A problem where an image that one subset holds out is trained on through another."""
    held = {path for dataset in validation for subset in dataset.subsets for path in subset.items.pictures.paths()}
    for dataset in training if held else ():
        for subset in dataset.subsets:
            both = [path for path in subset.items.pictures.paths() if path in held]
            if both:
                problems.add(
                    f"{subset.settings.where} trains on {len(both)} images that are held out for validation elsewhere: "
                    f"{some(both)}",
                    fix="give all subsets with these images the same validation_split and validation_seed",
                )


def check_held_out(plan: DataPlan, config: Config, report: Report) -> None:
    """A split that holds out nothing at all is a fault; without one, options of validation have no effect."""
    empty = list(of_none(plan))
    if plan.validation:
        for line in empty:
            report.note(line)
    elif empty:
        report.problems.add(empty[0], fix="raise validation_split, or add images")
    elif idle := [f"--{name}" for name in type(config.validation).model_fields if config.changed(name)]:
        report.no_effect(f"{', '.join(idle)}: no effect, for no image is held out; --validation_split says how many")


def of_none(plan: DataPlan) -> Iterator[str]:
    """Subsets that were to be split and are too small for it."""
    held = {subset.settings.where for dataset in plan.validation for subset in dataset.subsets}
    for dataset in plan.datasets:
        for subset in dataset.subsets:
            settings = subset.settings
            if settings.validation_split > 0 and not settings.is_reg and settings.where not in held:
                share, count = settings.validation_split, len(subset.items)
                yield f"{settings.where}: validation_split {share:g} of {count} images holds out none"
