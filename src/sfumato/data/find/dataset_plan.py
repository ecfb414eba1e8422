"""From the images of one dataset to its plan: validation split, size limit, repeats of regularization images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from sfumato.common.text import plural
from sfumato.data.find.findings import Findings
from sfumato.data.find.image_table import ImageTable, IntColumn
from sfumato.data.find.settings import DatasetSettings, SubsetSettings
from sfumato.data.plans import DatasetPlan, Items, SubsetPlan
from sfumato.data.split import disable_augmentation, split_subset


def plan_dataset(
    settings: DatasetSettings, sources: Sequence[tuple[SubsetSettings, ImageTable]], seed: int, findings: Findings
) -> tuple[DatasetPlan, list[DatasetPlan]]:
    """The training part, and the validation part if any images are held out. seed: of the validation split."""
    training: list[SubsetPlan] = []
    validation: list[SubsetPlan] = []
    for subset, images in sources:
        items = Items.from_images(images, settings.buckets.choose)
        train_rows, validation_rows = split_subset(len(items), subset, seed)
        train_rows = drop_small_images(train_rows, images, settings)
        validation_rows = drop_small_images(validation_rows, images, settings)
        dropped = len(items) - len(train_rows) - len(validation_rows)
        if dropped and settings.skip_image_resolution:
            width, height = settings.skip_image_resolution
            findings.note(f"{subset.where}: skipped {plural(dropped, 'image')} of at most {width}x{height}")
        if len(validation_rows):
            held_out = items.take(validation_rows)
            validation.append(
                SubsetPlan(settings=disable_augmentation(subset), items=held_out, repeats=(1,) * len(held_out))
            )
        if len(train_rows) < len(items):
            items = items.take(train_rows)
        training.append(SubsetPlan(settings=subset, items=items, repeats=(subset.num_repeats,) * len(items)))
    plan = DatasetPlan(settings=settings, subsets=tuple(balance_regularization(training, settings, findings)))
    if not plan.num_train_images and not findings.problems.found:
        findings.problems.add(
            f"{settings.where or 'the dataset'}: no images are left to train on",
            code="no-training-images",
            fix="lower skip_image_resolution or validation_split, or add images",
        )
    return plan, [DatasetPlan(settings=settings, subsets=tuple(validation))] if validation else []


def drop_small_images(rows: IntColumn, images: ImageTable, settings: DatasetSettings) -> IntColumn:
    """The rows of images with more pixels than `skip_image_resolution`."""
    limit = settings.skip_image_resolution
    if limit is None:
        return rows
    return rows[images.widths[rows] * images.heights[rows] > limit[0] * limit[1]]


def balance_regularization(
    subsets: Sequence[SubsetPlan], settings: DatasetSettings, findings: Findings
) -> Iterator[SubsetPlan]:
    """The subsets, with as many regularization samples as training samples, as in sd-scripts.

    Goes through the regularization images in order, first each with its own repeats, then once more each, and stops
    when the number is reached.
    """
    wanted, available = 0, 0
    groups: list[tuple[int, int]] = []
    for subset in subsets:
        if subset.settings.is_reg:
            available += len(subset.items)
            groups.append((subset.settings.num_repeats, len(subset.items)))
        else:
            wanted += sum(subset.repeats)
    where = settings.where or "regularization"
    if available and not wanted and not findings.problems.found:
        findings.problems.add(
            f"{where}: there are only regularization images",
            code="only-regularization-images",
            fix="add images to train on",
        )
    repeats = count_repeats(groups, wanted)
    surplus = sum(counts.count(0) for counts in repeats)
    if surplus:
        findings.note(
            f"{where}: {surplus} of {plural(available, 'regularization image is', 'regularization images are')} more "
            "than needed"
        )
    balanced = iter(repeats)
    for subset in subsets:
        yield replace(subset, repeats=next(balanced)) if subset.settings.is_reg else subset


def count_repeats(groups: Sequence[tuple[int, int]], wanted: int) -> list[tuple[int, ...]]:
    """How often each regularization image appears, by group. groups: (own repeats, number of images)."""
    image_counts = [images for _, images in groups]
    own = np.repeat([repeats for repeats, _ in groups], image_counts).astype(np.int64)
    before = np.cumsum(own) - own
    counts = np.where(before < wanted, own, 0)  # the first pass, up to the image that reaches the number
    more = wanted - int(counts.sum())
    if more > 0 and len(own):
        counts += more // len(own)
        counts[: more % len(own)] += 1
    parts = np.split(counts, np.cumsum(image_counts)[:-1]) if groups else []
    return [tuple(part.tolist()) for part in parts]
