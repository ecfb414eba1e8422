"""The data of a rehearsal: the batches of one step that need most memory, out of the run's own images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from sfumato.data.buckets import Size
from sfumato.data.plans import DataPlan, DatasetPlan, SubsetPlan


def keep_largest_batches(data: DataPlan, *, accumulation: int) -> DataPlan:
    """The same plan with few batches of one bucket for training and one for validation: those that have most pixels.

    accumulation: batches per step. From the second one on, gradients are there during forward, too; no further one
    needs more, so at most two are kept.
    """
    return replace(
        data,
        datasets=keep_largest(data.datasets, batches=min(accumulation, 2)),
        validation=keep_largest(data.validation, batches=1),
    )


def keep_largest(datasets: Iterable[DatasetPlan], *, batches: int) -> tuple[DatasetPlan, ...]:
    """Batches of the bucket whose fullest batch has most pixels; nothing where there are no datasets."""
    found = max(list_buckets(datasets), key=lambda each: count_batch_pixels(*each), default=None)
    return () if found is None else (keep_bucket(*found, batches=batches),)


def list_buckets(datasets: Iterable[DatasetPlan]) -> Iterator[tuple[DatasetPlan, Size]]:
    for dataset in datasets:
        for bucket in dataset.buckets:
            yield dataset, bucket


def count_batch_pixels(dataset: DatasetPlan, bucket: Size) -> int:
    return count_batch_samples(dataset, bucket) * bucket[0] * bucket[1]


def count_batch_samples(dataset: DatasetPlan, bucket: Size) -> int:
    """Samples of the bucket's fullest batch."""
    return min(dataset.buckets[bucket], dataset.settings.batch_size)


def keep_bucket(dataset: DatasetPlan, bucket: Size, *, batches: int) -> DatasetPlan:
    """So many full batches of the same samples, all of this bucket; where it is smaller than a batch, so are these."""
    missing = batch_size = count_batch_samples(dataset, bucket)
    subsets: list[SubsetPlan] = []
    for subset in dataset.subsets:
        rows: list[int] = []
        repeats: list[int] = []
        for row in subset.items.group_by_bucket().get(bucket, ()):
            count = min(subset.repeats[row], missing)
            if count:
                rows.append(row)
                repeats.append(count * batches)
                missing -= count
        if rows:
            items = subset.items.take(np.array(rows, np.int64))
            subsets.append(replace(subset, items=items, repeats=tuple(repeats)))
    return replace(dataset, settings=replace(dataset.settings, batch_size=batch_size), subsets=tuple(subsets))
