"""The rows about the data in the report before the first step: subsets, buckets, batches and steps."""

from __future__ import annotations

from collections import Counter

import numpy as np

from sfumato.common.text import plural
from sfumato.config.evaluation import VALIDATION_LEVELS
from sfumato.data.batch_sampler import ValidationSampler
from sfumato.data.buckets import Size
from sfumato.data.find.checks import has_masks
from sfumato.data.plans import DataPlan, DatasetPlan, SubsetPlan

ReportRow = tuple[str, str, str]  # group, name, value


def make_data_rows(
    plan: DataPlan, *, accumulation: int = 1, validation: ValidationSampler | None = None
) -> list[ReportRow]:
    """accumulation: micro-batches per step. validation: of the run, None where nothing is drawn from it."""
    rows: list[ReportRow] = []
    for i, dataset in enumerate(plan.datasets, 1):
        rows += make_dataset_rows(f"dataset {i}" if len(plan.datasets) > 1 else "dataset", dataset)
    rows.append(("epoch", "samples", str(plan.samples_per_epoch)))
    processes = f" over {plan.processes} processes" if plan.processes > 1 else ""
    rows.append(("epoch", "batches", f"{plan.batches_per_epoch}{processes}"))
    rows.append(("epoch", "steps", str(plan.count_steps_per_epoch(accumulation))))
    if not plan.validation:
        return rows
    used = plan.num_validation_images if validation is None else validation.num_samples
    note = f", {used} of them are used" if used < plan.num_validation_images else ""
    rows.append(("validation", "images", f"{plan.num_validation_images}{note}"))
    if validation is not None:
        rows.append(("validation", "batches", f"{len(validation.batches)}, each at {VALIDATION_LEVELS} noise levels"))
    return rows


def make_dataset_rows(group: str, dataset: DatasetPlan) -> list[ReportRow]:
    width, height = dataset.settings.resolution
    rows = [(group, "resolution", f"{width}x{height}, batch size {dataset.settings.batch_size}")]
    rows += [(group, *make_subset_row(subset)) for subset in dataset.subsets]
    enlarged = count_enlarged(dataset)
    for size, count in dataset.buckets.items():
        note = f", {plural(enlarged[size], 'image')} enlarged" if enlarged[size] else ""
        rows.append((group, f"bucket {size[0]}x{size[1]}", f"{plural(count, 'sample')}{note}"))
    return rows


def make_subset_row(subset: SubsetPlan) -> tuple[str, str]:
    """(source, what it contains)."""
    settings = subset.settings
    kind = "regularization images" if settings.is_reg else "images"
    facts = [f"{len(subset.items)} {kind}"]
    if has_masks(subset):
        facts.append("with masks")
    if count := len(subset.items.images.references):
        facts.append(f"with {count} reference image{'s' if count > 1 else ''} each")
    if settings.preserved:
        facts.append("preserving the output of the untrained model")
    if settings.timestep_offset:
        facts.append(f"timestep offset {settings.timestep_offset:+g}")
    return str(settings.source), ", ".join([*facts, f"{plural(subset.num_samples, 'sample')} per epoch"])


def count_enlarged(dataset: DatasetPlan) -> Counter[Size]:
    """How many images of each bucket are enlarged to fit it."""
    counts: Counter[Size] = Counter()
    for subset in dataset.subsets:
        items, images = subset.items, subset.items.images
        resized = np.array([choice.resized for choice in items.choices], np.int64).reshape(-1, 2)[items.choice_index]
        enlarged = (resized[:, 0] > images.widths) | (resized[:, 1] > images.heights)
        for size, rows in items.group_by_bucket().items():
            counts[size] += int(enlarged[rows].sum())
    return counts
