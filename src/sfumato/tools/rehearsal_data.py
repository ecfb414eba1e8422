"""The data of a rehearsal: the one batch that needs most memory, out of the run's own images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from sfumato.data.buckets import Size
from sfumato.data.plans import DataPlan, DatasetPlan, SubsetPlan


def keep_largest_batch(data: DataPlan) -> DataPlan:
    """The same plan with one batch of training and one of validation: those that have most pixels."""
    return replace(data, datasets=keep_largest(data.datasets), validation=keep_largest(data.validation))


def keep_largest(datasets: Iterable[DatasetPlan]) -> tuple[DatasetPlan, ...]:
    """One batch of the bucket whose fullest batch has most pixels; nothing where there are no datasets."""
    found = max(list_buckets(datasets), key=lambda each: count_batch_pixels(*each), default=None)
    return () if found is None else (keep_bucket(*found),)


def list_buckets(datasets: Iterable[DatasetPlan]) -> Iterator[tuple[DatasetPlan, Size]]:
    for dataset in datasets:
        for bucket in dataset.buckets:
            yield dataset, bucket


def count_batch_pixels(dataset: DatasetPlan, bucket: Size) -> int:
    return min(dataset.buckets[bucket], dataset.settings.batch_size) * bucket[0] * bucket[1]


def keep_bucket(dataset: DatasetPlan, bucket: Size) -> DatasetPlan:
    """At most one batch of samples, all of this bucket."""
    missing = dataset.settings.batch_size
    subsets: list[SubsetPlan] = []
    for subset in dataset.subsets:
        rows: list[int] = []
        repeats: list[int] = []
        for row in subset.items.group_by_bucket().get(bucket, ()):
            count = min(subset.repeats[row], missing)
            if count:
                rows.append(row)
                repeats.append(count)
                missing -= count
        if rows:
            items = subset.items.take(np.array(rows, np.int64))
            subsets.append(replace(subset, items=items, repeats=tuple(repeats)))
    return replace(dataset, subsets=tuple(subsets))
