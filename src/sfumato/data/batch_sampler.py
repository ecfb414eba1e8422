"""Batch samplers: the samples of each step, a function of (seed, epoch) for any number of processes and workers.

Global batches are formed over all processes, within one dataset and one bucket, and each process takes its slice. If
the last batch of a bucket does not divide evenly, some processes get padding samples, copies with weight 0 in the loss;
a single process never gets any.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np

from sfumato.common.seeds import python_random
from sfumato.data.buckets import Size
from sfumato.data.find.image_table import ImageRow
from sfumato.data.plans import DataPlan, DatasetPlan, Item, SubsetPlan


class BatchSampler:
    """The training batches of one process. first_step: the index of the step that gets the first data."""

    def __init__(self, plan: DataPlan, *, seed: int, accumulation: int = 1, rank: int = 0, first_step: int = 0) -> None:
        self.plan = plan
        self.seed = seed
        self.accumulation = accumulation
        self.rank = rank
        self.first_step = first_step
        self._items = [ItemIndex(dataset) for dataset in plan.datasets]
        self._first_images = list(accumulate((len(items) for items in self._items), initial=0))
        self._buckets = [group_by_bucket(dataset) for dataset in plan.datasets]
        self.samples_per_epoch = plan.samples_per_epoch
        self.steps_per_epoch = plan.count_steps_per_epoch(accumulation)
        assert self.samples_per_epoch > 0, "a plan without samples is refused before"

    def steps(self, first_step: int = 0) -> Iterator[PlannedStep]:
        """The steps from `first_step` (counted from 0) on, without end; earlier ones are not replayed."""
        epoch, skip = divmod(first_step - self.first_step, self.steps_per_epoch)
        while True:
            batches = self._plan_epoch(epoch)
            for step in range(skip, self.steps_per_epoch):
                first = step * self.accumulation
                group = [batches.get(i) for i in range(first, min(first + self.accumulation, len(batches)))]
                index = self.first_step + epoch * self.steps_per_epoch + step
                yield PlannedStep(
                    index=index,
                    epoch=index // self.steps_per_epoch,
                    batches=tuple(self._take_share(epoch, batch) for batch in group),
                    real_samples=sum(len(batch.positions) for batch in group),
                )
            epoch, skip = epoch + 1, 0

    def find_images(self, ids: Sequence[int]) -> list[ImageRow]:
        """The images of samples of one epoch and of this process; plans the epoch's batches to find them."""
        first = self.first_step + ids[0] // self.samples_per_epoch * self.steps_per_epoch
        return select_images(islice(self.steps(first), self.steps_per_epoch), ids)

    def _plan_epoch(self, epoch: int) -> EpochBatches:
        """Shuffle each bucket, cut it into global batches, and shuffle the batches."""
        rng = python_random(self.seed, "order", epoch)
        parts: list[BucketSamples] = []
        batches = array("Q")  # for each batch the index of its part << 32 | where it starts there
        for number, (dataset, buckets) in enumerate(zip(self.plan.datasets, self._buckets, strict=True)):
            batch_size = dataset.settings.batch_size * self.plan.processes
            for size, positions in buckets.items():
                shuffled = positions[:]
                rng.shuffle(shuffled)
                batches.extend(len(parts) << 32 | start for start in range(0, len(shuffled), batch_size))
                parts.append(BucketSamples(number, size, shuffled, batch_size))
        rng.shuffle(batches)
        return EpochBatches(parts, batches)

    def _take_share(self, epoch: int, batch: GlobalBatch) -> PlannedBatch:
        """The slice of this process, padded so that all processes get the same number of samples."""
        count = len(batch.positions)
        share = math.ceil(count / self.plan.processes)
        base = epoch * self.samples_per_epoch + batch.start_in_epoch
        samples = []
        for slot in range(self.rank * share, (self.rank + 1) * share):
            subset, item = self._items[batch.dataset][batch.positions[slot % count]]
            number = self._first_images[batch.dataset] + batch.positions[slot % count]
            samples.append(Sample(base + slot % count, subset, item, slot < count, number))
        return PlannedBatch(self.plan.datasets[batch.dataset], batch.bucket, tuple(samples))


class ValidationSampler:
    """Every held-out image once, in the same batches at each validation.

    A sample's id is its position among all held-out images, so that its noise is the same for any batch size. The
    batches are distributed over the processes; those with fewer repeat the last one with weight 0.
    max_batches: of one validation.
    """

    def __init__(self, plan: DataPlan, *, seed: int, max_batches: int | None = None, rank: int = 0) -> None:
        self.plan = plan
        self.seed = seed
        self.rank = rank
        batches: list[list[ValidationItem]] = []
        first_id = 0
        for number, dataset in enumerate(plan.validation):
            for bucket, positions in group_by_bucket(dataset).items():
                python_random(seed, "held out", number, *bucket).shuffle(positions)
                items = [ValidationItem(first_id + position, number, bucket, position) for position in positions]
                batch_size = dataset.settings.batch_size
                batches += [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
            first_id += sum(len(subset.items) for subset in dataset.subsets)
        python_random(seed, "held out").shuffle(batches)
        self.batches = batches[:max_batches]
        self.num_samples = sum(len(batch) for batch in self.batches)
        self.num_ids = first_id  # of all held-out images; every id is smaller
        self._items = [ItemIndex(dataset) for dataset in plan.validation]

    def steps(self, first_step: int = 0) -> Iterator[PlannedStep]:
        """The steps of this process, with one batch each."""
        processes = self.plan.processes
        for step in range(first_step, math.ceil(len(self.batches) / processes)):
            number = step * processes + self.rank
            batch, real = self.batches[min(number, len(self.batches) - 1)], number < len(self.batches)
            yield PlannedStep(index=step, epoch=0, batches=(self._plan_batch(batch, real),), real_samples=len(batch))

    def find_images(self, ids: Sequence[int]) -> list[ImageRow]:
        """The images of samples of this process."""
        return select_images(self.steps(), ids)

    def _plan_batch(self, batch: Sequence[ValidationItem], real: bool) -> PlannedBatch:
        samples = tuple(Sample(item.id, *self._items[item.dataset][item.position], real) for item in batch)
        return PlannedBatch(self.plan.validation[batch[0].dataset], batch[0].bucket, samples)


class ValidationItem(NamedTuple):
    """One held-out image."""

    id: int
    dataset: int
    bucket: Size
    position: int  # in its dataset's ItemIndex


def select_images(steps: Iterable[PlannedStep], ids: Sequence[int]) -> list[ImageRow]:
    """The images of the samples with these ids, in the order of the ids; ids that do not occur are skipped."""
    images: dict[int, ImageRow] = {}
    wanted = set(ids)
    for step in steps:
        for batch in step.batches:
            images |= {sample.id: sample.item.image for sample in batch.samples if sample.id in wanted}
    return [images[sample_id] for sample_id in ids if sample_id in images]


class ItemIndex:
    """The items of a dataset by their position, counted over all its subsets."""

    def __init__(self, dataset: DatasetPlan) -> None:
        self._subsets = dataset.subsets
        self._starts = list(accumulate((len(subset.items) for subset in dataset.subsets), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> tuple[SubsetPlan, Item]:
        subset = bisect_right(self._starts, position) - 1
        return self._subsets[subset], self._subsets[subset].items.get_row(position - self._starts[subset])


def group_by_bucket(dataset: DatasetPlan) -> dict[Size, array[int]]:
    """Bucket -> positions in the dataset, ascending, each as often as its item appears in an epoch."""
    buckets: dict[Size, array[int]] = {size: array("I") for size in dataset.buckets}
    start = 0
    for subset in dataset.subsets:
        repeats = np.array(subset.repeats, np.int64)
        for size, positions in subset.items.group_by_bucket().items():
            if size in buckets:  # not if no item of the bucket has repeats
                repeated = np.repeat(positions + start, repeats[positions])
                buckets[size].frombytes(repeated.astype(np.uint32).tobytes())
        start += len(subset.items)
    return buckets


class BucketSamples(NamedTuple):
    """The samples of one bucket in one epoch."""

    dataset: int
    bucket: Size
    positions: array[int]
    batch_size: int  # of all processes


class EpochBatches:
    """The global batches of an epoch; each is built when it is asked for."""

    def __init__(self, parts: Sequence[BucketSamples], batches: array[int]) -> None:
        self._parts = parts
        packed = np.array(batches, np.uint64)
        self._part = (packed >> 32).astype(np.int64)
        self._start = (packed & 0xFFFFFFFF).astype(np.int64)
        lengths = np.array([len(part.positions) for part in parts], np.int64)
        batch_sizes = np.array([part.batch_size for part in parts], np.int64)
        sizes = np.minimum(lengths[self._part] - self._start, batch_sizes[self._part])
        self._starts_in_epoch = np.cumsum(sizes) - sizes

    def __len__(self) -> int:
        return len(self._starts_in_epoch)

    def get(self, number: int) -> GlobalBatch:
        part, start = self._parts[self._part[number]], int(self._start[number])
        positions = part.positions[start : start + part.batch_size]
        return GlobalBatch(part.dataset, part.bucket, positions, int(self._starts_in_epoch[number]))


class GlobalBatch(NamedTuple):
    """One micro-batch of all processes together."""

    dataset: int
    bucket: Size
    positions: array[int]
    start_in_epoch: int  # of its first sample in the epoch


class Sample(NamedTuple):
    """One appearance of an item."""

    id: int  # epoch * samples per epoch + position in the epoch's global order
    subset: SubsetPlan
    item: Item
    real: bool  # False for a padding sample
    image_number: int = -1  # position among the training images of all datasets; -1 for any other image


class PlannedBatch(NamedTuple):
    """One micro-batch of one process."""

    dataset: DatasetPlan
    bucket: Size
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One optimizer step of one process."""

    index: int  # from 0
    epoch: int  # from 0
    batches: tuple[PlannedBatch, ...]
    real_samples: int  # of all processes and micro-batches
