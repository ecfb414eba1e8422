"""Which samples make which step: a function of (seed, epoch), the same for any number of processes and workers.

Batches are formed over all processes, inside one dataset and one bucket, and each process takes its slice. Where a
bucket's last batch does not divide evenly, copies with weight 0 fill up what some processes lack; a single process
never gets any.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from sfumato.data.buckets import Size
from sfumato.data.plans import DataPlan, DatasetPlan, Item, SubsetPlan
from sfumato.seeds import python_random


class Order:
    """The global order of all epochs, as one process sees it."""

    def __init__(self, plan: DataPlan, *, seed: int, accumulation: int = 1, rank: int = 0) -> None:
        self.plan = plan
        self.seed = seed
        self.accumulation = accumulation
        self.rank = rank
        self._entries = [entries(dataset) for dataset in plan.datasets]
        self._buckets = [by_bucket(dataset) for dataset in plan.datasets]
        self.samples_per_epoch = plan.samples_per_epoch
        self.steps_per_epoch = plan.steps_per_epoch(accumulation)
        assert self.samples_per_epoch > 0, "a plan without samples is refused before"

    def steps(self, first_step: int = 0) -> Iterator[PlannedStep]:
        """The steps from `first_step` (counted from 0) on, without end; earlier ones are not replayed."""
        epoch, skip = divmod(first_step, self.steps_per_epoch)
        while True:
            batches = self._epoch(epoch)
            for step in range(skip, self.steps_per_epoch):
                group = batches[step * self.accumulation : (step + 1) * self.accumulation]
                yield PlannedStep(
                    index=epoch * self.steps_per_epoch + step,
                    epoch=epoch,
                    batches=tuple(self._mine(epoch, batch) for batch in group),
                    real_samples=sum(len(batch.picks) for batch in group),
                )
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[GlobalBatch]:
        """The epoch's batches over all processes, each with the place of its first sample."""
        rng = python_random(self.seed, "order", epoch)
        found: list[tuple[int, Size, array[int]]] = []
        for d, (dataset, buckets) in enumerate(zip(self.plan.datasets, self._buckets, strict=True)):
            together = dataset.settings.batch_size * self.plan.processes
            for size, picks in buckets.items():
                shuffled = picks[:]
                rng.shuffle(shuffled)
                found += [(d, size, shuffled[i : i + together]) for i in range(0, len(shuffled), together)]
        rng.shuffle(found)
        batches, place = [], 0
        for d, size, picks in found:
            batches.append(GlobalBatch(d, size, picks, place))
            place += len(picks)
        return batches

    def _mine(self, epoch: int, batch: GlobalBatch) -> PlannedBatch:
        """This process's slice, as long as every other's."""
        count = len(batch.picks)
        share = math.ceil(count / self.plan.processes)
        base = epoch * self.samples_per_epoch + batch.place
        samples = []
        for slot in range(self.rank * share, (self.rank + 1) * share):
            subset, item = self._entries[batch.dataset][batch.picks[slot % count]]
            samples.append(Sample(base + slot % count, subset, item, slot < count))
        return PlannedBatch(self.plan.datasets[batch.dataset], batch.bucket, tuple(samples))


def entries(dataset: DatasetPlan) -> list[tuple[SubsetPlan, Item]]:
    return [(subset, item) for subset in dataset.subsets for item in subset.items]


def by_bucket(dataset: DatasetPlan) -> dict[Size, array[int]]:
    """Places in `entries` by bucket, ascending, each as often as its item appears in an epoch."""
    found: dict[Size, array[int]] = {size: array("I") for size in dataset.buckets}
    repeats = (count for subset in dataset.subsets for count in subset.repeats)
    for place, ((_, item), count) in enumerate(zip(entries(dataset), repeats, strict=True)):
        if count:
            found[item.choice.bucket].extend((place,) * count)
    return found


class GlobalBatch(NamedTuple):
    """One micro-batch of all processes together."""

    dataset: int
    bucket: Size
    picks: array[int]
    place: int  # of its first sample in the epoch


class Sample(NamedTuple):
    """One appearance of an item."""

    id: int  # epoch * samples per epoch + place in the epoch's global order
    subset: SubsetPlan
    item: Item
    real: bool  # False for a copy that only fills up a batch


class PlannedBatch(NamedTuple):
    """One micro-batch of one process."""

    dataset: DatasetPlan
    bucket: Size
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One optimizer step of one process."""

    index: int  # steps before it, from 0
    epoch: int  # from 0
    batches: tuple[PlannedBatch, ...]
    real_samples: int  # of all processes and micro-batches
