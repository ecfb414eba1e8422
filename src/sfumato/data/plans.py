"""The data of a run as found: what is trained at which size, how often, in how many batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from sfumato.data.augment import Draw, ImageRules, centred, drawn
from sfumato.data.buckets import Choice, Size
from sfumato.data.find.image_table import Column, Picture, Pictures, Rows
from sfumato.data.find.settings import DatasetSettings, SubsetSettings
from sfumato.data.images import Transform


class Item(NamedTuple):
    """One picture and where it goes."""

    picture: Picture
    choice: Choice
    conditioning: Picture | None = None  # its mask or control image

    @property
    def size(self) -> Size:
        """Width and height as shown."""
        return self.picture.size

    def transform(self, rules: ImageRules, *, flip: bool = False) -> Transform:
        """What is done to its pixels where nothing is left to chance."""
        return centred(rules, self.size, self.choice, flip=flip)

    def drawn(self, rules: ImageRules, draw: Draw) -> Transform:
        """What is done to its pixels this time."""
        return drawn(rules, self.size, self.choice, self.picture.path, draw)


@dataclass(frozen=True, kw_only=True, eq=False)
class Items(Rows[Item]):
    """Pictures and where they go, in columns: each item is made when it is asked for."""

    pictures: Pictures
    choices: tuple[Choice, ...]  # that are different
    which: Column  # of the choices, for each picture

    @classmethod
    def chosen(cls, pictures: Pictures, choose: Callable[[Size], Choice]) -> Self:
        sizes, which = pictures.sizes()
        return cls(pictures=pictures, choices=tuple(choose(size) for size in sizes), which=which)

    def __len__(self) -> int:
        return len(self.pictures)

    def row(self, place: int) -> Item:
        partners = self.pictures.conditioning
        partner = partners.row(place) if partners is not None else None
        return Item(self.pictures.row(place), self.choices[self.which[place]], partner)

    def take(self, rows: Column) -> Items:
        """Those at these places, in this order."""
        return Items(pictures=self.pictures.take(rows), choices=self.choices, which=self.which[rows])

    def buckets(self) -> dict[Size, Column]:
        """Places by bucket, ascending."""
        sizes = sorted({choice.bucket for choice in self.choices})
        number = {size: i for i, size in enumerate(sizes)}
        of_choice = np.array([number[choice.bucket] for choice in self.choices], np.int64)
        of_item = of_choice[self.which] if len(self) else self.which
        return {size: places for i, size in enumerate(sizes) if len(places := np.flatnonzero(of_item == i))}


@dataclass(frozen=True, kw_only=True)
class SubsetPlan:
    """The pictures of one subset."""

    settings: SubsetSettings
    items: Items
    repeats: tuple[int, ...]  # how often each item appears per epoch; 0 for surplus regularisation images

    @property
    def samples(self) -> int:
        return sum(self.repeats)


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """Subsets that share batches."""

    settings: DatasetSettings
    subsets: tuple[SubsetPlan, ...]

    @cached_property
    def buckets(self) -> dict[Size, int]:
        """Samples per epoch by bucket size, ascending."""
        counts: dict[Size, int] = {}
        for subset in self.subsets:
            repeats = np.array(subset.repeats, np.int64)
            for size, places in subset.items.buckets().items():
                counts[size] = counts.get(size, 0) + int(repeats[places].sum())
        return {size: counts[size] for size in sorted(counts) if counts[size]}

    def batches(self, processes: int) -> int:
        """Global batches per epoch; the last of a bucket may be short."""
        together = self.settings.batch_size * processes
        return sum(math.ceil(count / together) for count in self.buckets.values())

    @property
    def num_train_images(self) -> int:
        return sum(subset.samples for subset in self.subsets if not subset.settings.is_reg)

    @property
    def num_reg_images(self) -> int:
        """With their own repeats, before they are balanced: as the field's metadata counts them."""
        return sum(subset.settings.num_repeats * len(subset.items) for subset in self.subsets if subset.settings.is_reg)

    @property
    def mean_aspect_error(self) -> float:
        """Mean difference between the buckets' and the images' width/height, over images."""
        total, count = 0.0, 0
        for subset in self.subsets:
            items = subset.items
            wanted = np.array([choice.bucket[0] / choice.bucket[1] for choice in items.choices])
            total += float(np.abs(wanted[items.which] - items.pictures.widths / items.pictures.heights).sum())
            count += len(items)
        return total / count if count else 0.0


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """All of a run's data."""

    datasets: tuple[DatasetPlan, ...]
    validation: tuple[DatasetPlan, ...]  # held-out images, each once; no regularisation images
    processes: int
    prior_loss_weight: float
    from_file: bool  # whether a dataset file described it
    notes: tuple[str, ...]  # lines for the report before the first step
    bad_images: Mapping[str, list[str]] = field(default_factory=dict)  # subset -> what is wrong with its bad ones

    @property
    def num_train_images(self) -> int:
        """Training samples of an epoch, repeats included, regularisation images not."""
        return sum(dataset.num_train_images for dataset in self.datasets)

    @property
    def num_reg_images(self) -> int:
        return sum(dataset.num_reg_images for dataset in self.datasets)

    @property
    def num_validation_images(self) -> int:
        return sum(dataset.num_train_images for dataset in self.validation)

    @property
    def samples_per_epoch(self) -> int:
        """Training and regularisation samples."""
        return sum(sum(dataset.buckets.values()) for dataset in self.datasets)

    @property
    def buckets(self) -> dict[Size, int]:
        """Samples per epoch by bucket size, of all datasets together, ascending."""
        counts: Counter[Size] = Counter()
        for dataset in self.datasets:
            counts.update(dataset.buckets)
        return {size: counts[size] for size in sorted(counts)}

    @property
    def batches_per_epoch(self) -> int:
        """Global micro-batches of an epoch, over all processes."""
        return sum(dataset.batches(self.processes) for dataset in self.datasets)

    def steps_per_epoch(self, accumulation: int) -> int:
        """Optimizer steps of an epoch; the last may have fewer micro-batches."""
        return math.ceil(self.batches_per_epoch / accumulation)

    @property
    def multipliers(self) -> bool:
        """Whether any dataset sets an adapter strength of its own."""
        return any(dataset.settings.network_multiplier != 1.0 for dataset in self.datasets)

    @property
    def preserves(self) -> bool:
        """Whether any sample's target is what the model said before training."""
        datasets = (*self.datasets, *self.validation)
        return any(subset.settings.preserved and subset.samples for dataset in datasets for subset in dataset.subsets)

    def used(self) -> Iterator[tuple[DatasetPlan, SubsetPlan, Item]]:
        """Every item that appears at all, of training and validation."""
        for dataset in (*self.datasets, *self.validation):
            for subset in dataset.subsets:
                for item, repeats in zip(subset.items, subset.repeats, strict=True):
                    if repeats:
                        yield dataset, subset, item
