"""Validation split: which images are held out; no image is in both parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np

from sfumato.common.text import list_some, plural
from sfumato.config import Config
from sfumato.data.batch_sampler import ValidationSampler
from sfumato.data.find.findings import Findings
from sfumato.data.find.image_table import IntColumn
from sfumato.data.find.settings import SubsetSettings
from sfumato.data.plans import DataPlan, DatasetPlan, SubsetPlan
from sfumato.errors import Problems


def choose_validation_seed(config: Config) -> int:
    """--validation_seed, else --seed; 0 if neither is given, so that a resumed run holds out the same images."""
    if config.validation.validation_seed is not None:
        return config.validation.validation_seed
    is_random = config.source("seed") == "default"
    return 0 if is_random or config.loop.seed is None else config.loop.seed


def make_validation_sampler(config: Config, plan: DataPlan, *, rank: int = 0) -> ValidationSampler:
    """The sampler of the held-out images."""
    seed, max_batches = choose_validation_seed(config), config.validation.max_validation_steps
    return ValidationSampler(plan, seed=seed, max_batches=max_batches, rank=rank)


def disable_augmentation(settings: SubsetSettings) -> SubsetSettings:
    """The settings of held-out images: no augmentation, complete captions in their order."""
    rules = replace(
        settings.rules,
        shuffle_caption=False,
        token_warmup_step=0,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
    )
    images = replace(settings.images, flip_aug=False, color_aug=False, random_crop=False, face_crop_aug_range=None)
    return replace(settings, rules=rules, images=images)


def split_subset(count: int, subset: SubsetSettings, seed: int) -> tuple[IntColumn, IntColumn]:
    """Positions of the training and of the validation images; regularization images are never held out.

    seed: used if the subset has no validation_seed. Depends on nothing else, so that a folder which several datasets
    use is split equally in all of them.
    """
    if subset.validation_split == 0 or subset.is_reg:
        return np.arange(count), np.zeros(0, np.int64)
    subset_seed = seed if subset.validation_seed is None else subset.validation_seed
    training, validation = split_positions(count, subset.validation_split, subset_seed)
    return np.array(training, np.int64), np.array(validation, np.int64)


def split_positions(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions of the training and of the validation images: the last round(count * share) of a shuffle are held out.

    The rule of sd-scripts, without its overlap of one image in many cases.
    """
    positions = list(range(count))
    Random(seed).shuffle(positions)
    cut = count - round(count * share)
    return sorted(positions[:cut]), positions[cut:]


def refuse_overlap(training: Sequence[DatasetPlan], validation: Sequence[DatasetPlan], problems: Problems) -> None:
    """A problem for each subset that trains on images which another one holds out."""
    held_out: set[str] = set()
    for dataset in validation:
        for subset in dataset.subsets:
            held_out.update(subset.items.images.paths())
    for dataset in training if held_out else ():
        for subset in dataset.subsets:
            overlap = [path for path in subset.items.images.paths() if path in held_out]
            if overlap:
                problems.add(
                    f"{subset.settings.where} trains on {plural(len(overlap), 'image')} that another subset holds out "
                    "for "
                    f"validation: {list_some(overlap)}",
                    code="validation-images-trained-on",
                    fix="give all subsets with these images the same validation_split and validation_seed",
                )


def check_validation_split(plan: DataPlan, config: Config, report: Findings) -> None:
    """A problem if a validation_split holds out no image; a warning for validation options without a split."""
    empty = list_empty_splits(plan)
    if plan.validation:
        for subset in empty:
            report.note(
                f"{subset.settings.where}: validation_split {subset.settings.validation_split:g} of "
                f"{plural(len(subset.items), 'image')} holds out none"
            )
    elif empty:
        settings, count = empty[0].settings, len(empty[0].items)
        report.problems.add(
            f"{settings.where}: validation_split {settings.validation_split:g} of {plural(count, 'image')} holds out "
            "none",
            code="validation-split-empty",
            fix="raise validation_split, or add images",
        )
    elif options := [f"--{name}" for name in type(config.validation).model_fields if config.is_changed(name)]:
        report.report_no_effect(
            f"{', '.join(options)}: no effect because no image is held out; --validation_split sets their share"
        )


def list_empty_splits(plan: DataPlan) -> list[SubsetPlan]:
    """The subsets that are too small for their validation_split."""
    split: set[str] = set()
    for dataset in plan.validation:
        split |= {subset.settings.where for subset in dataset.subsets}
    empty: list[SubsetPlan] = []
    for dataset in plan.datasets:
        for subset in dataset.subsets:
            settings = subset.settings
            if settings.validation_split > 0 and not settings.is_reg and settings.where not in split:
                empty.append(subset)
    return empty
