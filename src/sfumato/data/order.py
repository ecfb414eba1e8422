"""Which samples make which step: a function of (seed, epoch), the same for any number of processes and workers.

Batches are formed over all processes, inside one dataset and one bucket, and each process takes its slice. Where a
bucket's last batch does not divide evenly, copies with weight 0 fill up what some processes lack; a single process
never gets any.
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
from sfumato.data.find.image_table import Picture
from sfumato.data.plans import DataPlan, DatasetPlan, Item, SubsetPlan


class Order:
    """The global order of all epochs, as one process sees it. began: what the step with the first data is called."""

    def __init__(self, plan: DataPlan, *, seed: int, accumulation: int = 1, rank: int = 0, began: int = 0) -> None:
        self.plan = plan
        self.seed = seed
        self.accumulation = accumulation
        self.rank = rank
        self.began = began
        self._entries = [Entries(dataset) for dataset in plan.datasets]
        self._buckets = [by_bucket(dataset) for dataset in plan.datasets]
        self.samples_per_epoch = plan.samples_per_epoch
        self.steps_per_epoch = plan.steps_per_epoch(accumulation)
        assert self.samples_per_epoch > 0, "a plan without samples is refused before"

    def steps(self, first_step: int = 0) -> Iterator[PlannedStep]:
        """The steps from `first_step` (counted from 0) on, without end; earlier ones are not replayed."""
        epoch, skip = divmod(first_step - self.began, self.steps_per_epoch)
        while True:
            batches = self._epoch(epoch)
            for step in range(skip, self.steps_per_epoch):
                first = step * self.accumulation
                group = [batches.batch(i) for i in range(first, min(first + self.accumulation, len(batches)))]
                index = self.began + epoch * self.steps_per_epoch + step
                yield PlannedStep(
                    index=index,
                    epoch=index // self.steps_per_epoch,
                    batches=tuple(self._mine(epoch, batch) for batch in group),
                    real_samples=sum(len(batch.picks) for batch in group),
                )
            epoch, skip = epoch + 1, 0

    def pictures(self, ids: Sequence[int]) -> list[Picture]:
        """The pictures behind samples of one epoch and of this process; goes through the epoch to find them."""
        epoch = ids[0] // self.samples_per_epoch
        return pictures_in(islice(self.steps(epoch * self.steps_per_epoch), self.steps_per_epoch), ids)

    def _epoch(self, epoch: int) -> EpochOrder:
        """Shuffled within each bucket, cut into batches over all processes, and the batches shuffled."""
        rng = python_random(self.seed, "order", epoch)
        parts: list[Part] = []
        every = array("Q")  # for each batch its part, and where it begins there
        for d, (dataset, buckets) in enumerate(zip(self.plan.datasets, self._buckets, strict=True)):
            together = dataset.settings.batch_size * self.plan.processes
            for size, picks in buckets.items():
                shuffled = picks[:]
                rng.shuffle(shuffled)
                every.extend(len(parts) << 32 | start for start in range(0, len(shuffled), together))
                parts.append(Part(d, size, shuffled, together))
        rng.shuffle(every)
        return EpochOrder(parts, every)

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


class HeldOut:
    """Every held-out image once, in the same batches at each validation, whatever trains meanwhile.

    A sample's id is its place among all held-out images, so that its noise is the same for any batch size. Whole
    batches are shared among the processes; those that get fewer do the last one again, with weight 0.
    most: batches of one validation, at most.
    """

    def __init__(self, plan: DataPlan, *, seed: int, most: int | None = None, rank: int = 0) -> None:
        self.plan = plan
        self.seed = seed
        self.rank = rank
        batches: list[list[Held]] = []
        first = 0
        for number, dataset in enumerate(plan.validation):
            for bucket, places in by_bucket(dataset).items():
                python_random(seed, "held out", number, *bucket).shuffle(places)
                size = dataset.settings.batch_size
                some = (places[start : start + size] for start in range(0, len(places), size))
                batches += [[Held(first + place, number, bucket, place) for place in each] for each in some]
            first += sum(len(subset.items) for subset in dataset.subsets)
        python_random(seed, "held out").shuffle(batches)
        self.batches = batches[:most]
        self.samples = sum(len(batch) for batch in self.batches)
        self.ids = first  # below which all ids are
        self._entries = [Entries(dataset) for dataset in plan.validation]

    def steps(self, first_step: int = 0) -> Iterator[PlannedStep]:
        """This process's share, one batch to a step."""
        processes = self.plan.processes
        for turn in range(first_step, math.ceil(len(self.batches) / processes)):
            place = turn * processes + self.rank
            batch, real = self.batches[min(place, len(self.batches) - 1)], place < len(self.batches)
            yield PlannedStep(index=turn, epoch=0, batches=(self._planned(batch, real),), real_samples=len(batch))

    def pictures(self, ids: Sequence[int]) -> list[Picture]:
        """The pictures behind samples of this process."""
        return pictures_in(self.steps(), ids)

    def _planned(self, batch: Sequence[Held], real: bool) -> PlannedBatch:
        samples = tuple(Sample(each.id, *self._entries[each.dataset][each.place], real) for each in batch)
        return PlannedBatch(self.plan.validation[batch[0].dataset], batch[0].bucket, samples)


class Held(NamedTuple):
    """One held-out image."""

    id: int
    dataset: int
    bucket: Size
    place: int  # in its dataset's entries


def pictures_in(steps: Iterable[PlannedStep], ids: Sequence[int]) -> list[Picture]:
    samples = (sample for step in steps for batch in step.batches for sample in batch.samples)
    found = {sample.id: sample.item.picture for sample in samples if sample.id in set(ids)}
    return [found[each] for each in ids if each in found]


class Entries:
    """The items of a dataset, one after the other over its subsets."""

    def __init__(self, dataset: DatasetPlan) -> None:
        self._subsets = dataset.subsets
        self._starts = list(accumulate((len(subset.items) for subset in dataset.subsets), initial=0))

    def __getitem__(self, place: int) -> tuple[SubsetPlan, Item]:
        subset = bisect_right(self._starts, place) - 1
        return self._subsets[subset], self._subsets[subset].items.row(place - self._starts[subset])


def by_bucket(dataset: DatasetPlan) -> dict[Size, array[int]]:
    """Places in the dataset's entries by bucket, ascending, each as often as its item appears in an epoch."""
    found: dict[Size, array[int]] = {size: array("I") for size in dataset.buckets}
    start = 0
    for subset in dataset.subsets:
        repeats = np.array(subset.repeats, np.int64)
        for size, places in subset.items.buckets().items():
            if size in found:  # not where all its items are surplus
                found[size].frombytes(np.repeat(places + start, repeats[places]).astype(np.uint32).tobytes())
        start += len(subset.items)
    return found


class Part(NamedTuple):
    """One bucket's samples in one epoch."""

    dataset: int
    bucket: Size
    picks: array[int]
    together: int  # samples of a batch


class EpochOrder:
    """The batches of an epoch over all processes; each is cut out when it is asked for."""

    def __init__(self, parts: Sequence[Part], batches: array[int]) -> None:
        self._parts = parts
        packed = np.array(batches, np.uint64)
        self._part = (packed >> 32).astype(np.int64)
        self._start = (packed & 0xFFFFFFFF).astype(np.int64)
        ends = np.array([len(part.picks) for part in parts], np.int64)
        together = np.array([part.together for part in parts], np.int64)
        sizes = np.minimum(ends[self._part] - self._start, together[self._part])
        self._places = np.cumsum(sizes) - sizes

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, number: int) -> GlobalBatch:
        part, start = self._parts[self._part[number]], int(self._start[number])
        picks = part.picks[start : start + part.together]
        return GlobalBatch(part.dataset, part.bucket, picks, int(self._places[number]))


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
