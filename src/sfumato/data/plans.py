"""Data plans: which images a run trains on, at which size, how often and in how many batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from sfumato.data.augment import ImageRules, MakeRandom, center_transform, draw_transform
from sfumato.data.buckets import BucketChoice, Size
from sfumato.data.find.image_table import ColumnSequence, ImageRow, ImageTable, IntColumn
from sfumato.data.find.settings import DatasetSettings, SubsetSettings
from sfumato.data.images import Transform


class Item(NamedTuple):
    """One image and its bucket."""

    image: ImageRow
    choice: BucketChoice
    conditioning: ImageRow | None = None  # its mask or control image
    references: tuple[ImageRow, ...] = ()

    @property
    def size(self) -> Size:
        """Width and height, after rotating by the EXIF orientation."""
        return self.image.size

    def center_transform(self, rules: ImageRules, *, flip: bool = False) -> Transform:
        """The transform without random augmentation: the center crop, flipped or not."""
        return center_transform(rules, self.size, self.choice, flip=flip)

    def draw_transform(self, rules: ImageRules, make_random: MakeRandom) -> Transform:
        """A random transform, a function of the generators that `make_random` returns."""
        return draw_transform(rules, self.size, self.choice, self.image.path, make_random)


@dataclass(frozen=True, kw_only=True, eq=False)
class Items(ColumnSequence[Item]):
    """Images and their buckets, stored in columns; each item is built when it is asked for."""

    images: ImageTable
    choices: tuple[BucketChoice, ...]  # the distinct ones
    choice_index: IntColumn  # index into choices, for each image

    @classmethod
    def from_images(cls, images: ImageTable, choose: Callable[[Size], BucketChoice]) -> Self:
        sizes, size_index = images.sizes()
        return cls(images=images, choices=tuple(choose(size) for size in sizes), choice_index=size_index)

    def __len__(self) -> int:
        return len(self.images)

    def get_row(self, index: int) -> Item:
        conditioning = self.images.conditioning
        partner = conditioning.get_row(index) if conditioning is not None else None
        references = tuple(table.get_row(index) for table in self.images.references)
        return Item(self.images.get_row(index), self.choices[self.choice_index[index]], partner, references)

    def take(self, rows: IntColumn) -> Items:
        """The items at these positions, in this order."""
        return Items(images=self.images.take(rows), choices=self.choices, choice_index=self.choice_index[rows])

    def group_by_bucket(self) -> dict[Size, IntColumn]:
        """Bucket -> positions of its items; buckets ascending, empty ones omitted."""
        sizes = sorted({choice.bucket for choice in self.choices})
        number = {size: i for i, size in enumerate(sizes)}
        bucket_of_choice = np.array([number[choice.bucket] for choice in self.choices], np.int64)
        bucket_of_item = bucket_of_choice[self.choice_index] if len(self) else self.choice_index
        positions = {size: np.flatnonzero(bucket_of_item == i) for i, size in enumerate(sizes)}
        return {size: column for size, column in positions.items() if len(column)}


@dataclass(frozen=True, kw_only=True)
class SubsetPlan:
    """The images of one subset."""

    settings: SubsetSettings
    items: Items
    repeats: tuple[int, ...]  # how often each item appears per epoch; 0 for surplus regularization images

    @property
    def num_samples(self) -> int:
        return sum(self.repeats)

    @cached_property
    def buckets(self) -> dict[Size, int]:
        """Samples per epoch by bucket size, ascending."""
        repeats = np.array(self.repeats, np.int64)
        counts = {size: int(repeats[rows].sum()) for size, rows in self.items.group_by_bucket().items()}
        return {size: count for size, count in counts.items() if count}


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """Subsets that share batches."""

    settings: DatasetSettings
    subsets: tuple[SubsetPlan, ...]

    @cached_property
    def buckets(self) -> dict[Size, int]:
        """Samples per epoch by bucket size, ascending."""
        counts: Counter[Size] = Counter()
        for subset in self.subsets:
            counts.update(subset.buckets)
        return {size: counts[size] for size in sorted(counts)}

    def count_batches(self, processes: int) -> int:
        """Global batches per epoch; the last of a bucket may be short."""
        global_batch_size = self.settings.batch_size * processes
        return sum(math.ceil(count / global_batch_size) for count in self.buckets.values())

    @property
    def num_train_images(self) -> int:
        return sum(subset.num_samples for subset in self.subsets if not subset.settings.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Counted with num_repeats, before they are balanced, like sd-scripts does in its metadata."""
        return sum(subset.settings.num_repeats * len(subset.items) for subset in self.subsets if subset.settings.is_reg)

    @property
    def mean_aspect_error(self) -> float:
        """Mean absolute difference between the width/height of the bucket and of the image, over images."""
        total, count = 0.0, 0
        for subset in self.subsets:
            items = subset.items
            ratios = np.array([choice.bucket[0] / choice.bucket[1] for choice in items.choices])
            total += float(np.abs(ratios[items.choice_index] - items.images.widths / items.images.heights).sum())
            count += len(items)
        return total / count if count else 0.0


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """All of a run's data."""

    datasets: tuple[DatasetPlan, ...]
    validation: tuple[DatasetPlan, ...]  # held-out images, each once; no regularization images
    processes: int
    prior_loss_weight: float
    from_file: bool  # whether it comes from --dataset_config
    notes: tuple[str, ...]  # lines for the report before the first step
    bad_images: Mapping[str, list[str]] = field(default_factory=dict)  # subset -> what is wrong with its bad ones

    @property
    def num_train_images(self) -> int:
        """Training samples per epoch, with repeats, without regularization images."""
        return sum(dataset.num_train_images for dataset in self.datasets)

    @property
    def num_reg_images(self) -> int:
        return sum(dataset.num_reg_images for dataset in self.datasets)

    @property
    def num_validation_images(self) -> int:
        return sum(dataset.num_train_images for dataset in self.validation)

    @property
    def samples_per_epoch(self) -> int:
        """Training and regularization samples."""
        return sum(sum(dataset.buckets.values()) for dataset in self.datasets)

    @property
    def buckets(self) -> dict[Size, int]:
        """Samples per epoch by bucket size, of all datasets together, ascending."""
        counts: Counter[Size] = Counter()
        for dataset in self.datasets:
            counts.update(dataset.buckets)
        return {size: counts[size] for size in sorted(counts)}

    @property
    def sizes_and_offsets(self) -> dict[tuple[Size, float], int]:
        """Samples per epoch by bucket size and timestep offset."""
        counts: Counter[tuple[Size, float]] = Counter()
        for subset in (subset for dataset in self.datasets for subset in dataset.subsets):
            for size, count in subset.buckets.items():
                counts[size, subset.settings.timestep_offset] += count
        return dict(counts)

    @property
    def batches_per_epoch(self) -> int:
        """Global micro-batches per epoch, over all processes."""
        return sum(dataset.count_batches(self.processes) for dataset in self.datasets)

    def count_steps_per_epoch(self, accumulation: int) -> int:
        """Optimizer steps per epoch; the last may have fewer micro-batches."""
        return math.ceil(self.batches_per_epoch / accumulation)

    @property
    def has_multipliers(self) -> bool:
        """Whether any dataset sets its own network_multiplier."""
        return any(dataset.settings.network_multiplier != 1.0 for dataset in self.datasets)

    @property
    def num_references(self) -> int:
        """The most reference images that any image has."""
        counts = [0]
        for dataset in (*self.datasets, *self.validation):
            counts += [len(subset.items.images.references) for subset in dataset.subsets]
        return max(counts)

    @property
    def has_preserved_samples(self) -> bool:
        """Whether the target of any sample is the prediction of the reference model."""
        for dataset in (*self.datasets, *self.validation):
            if any(subset.settings.preserved and subset.num_samples for subset in dataset.subsets):
                return True
        return False

    def iterate_used(self) -> Iterator[tuple[DatasetPlan, SubsetPlan, Item]]:
        """Every item with at least one repeat, of training and validation."""
        for dataset in (*self.datasets, *self.validation):
            for subset in dataset.subsets:
                for item, repeats in zip(subset.items, subset.repeats, strict=True):
                    if repeats:
                        yield dataset, subset, item
