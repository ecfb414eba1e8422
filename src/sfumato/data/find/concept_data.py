"""The data of concept training: prompts in the place of images, one dataset for each concept of --prompts_file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sfumato.config import Config
from sfumato.config.concepts import Concept, read_concepts
from sfumato.data.augment import ImageRules
from sfumato.data.buckets import BucketChoice, Buckets, Size, round_down
from sfumato.data.captions import CaptionRules
from sfumato.data.find.discover import find_data
from sfumato.data.find.image_table import ImageRow, ImageTable
from sfumato.data.find.settings import DatasetSettings, SubsetSettings
from sfumato.data.plans import DataPlan, DatasetPlan, Items, SubsetPlan
from sfumato.errors import Problems

DYNAMIC_STEP = 64  # pixels between the sides of dynamic_resolution


def find_run_data(
    config: Config,
    *,
    bucket_step: int,
    size_step: int,
    processes: int,
    remember: bool,
    problems: Problems,
) -> DataPlan:
    """What a run trains on, images or prompts; the arguments are those of `find_data`."""
    if config.leco.prompts_file:
        return find_concepts(config, size_step=size_step, processes=processes, problems=problems)
    return find_data(
        config,
        bucket_step=bucket_step,
        size_step=size_step,
        processes=processes,
        remember=remember,
        problems=problems,
    )


def find_concepts(config: Config, *, size_step: int, processes: int, problems: Problems) -> DataPlan:
    """One sample of each concept and size per epoch, or as many as its batch_size; faults are added to `problems`.

    size_step: sides in pixels are rounded down to a multiple of it.
    """
    datasets: tuple[DatasetPlan, ...] = ()
    notes: list[str] = []
    path = config.leco.prompts_file
    with problems.catch():
        assert path is not None
        concepts = read_concepts(path)
        sizes = [list_concept_sizes(concept, size_step) for concept in concepts]
        most = max(map(len, sizes))
        datasets = tuple(
            plan_concept(path, number, concept, own, math.ceil(most / len(own)))
            for number, (concept, own) in enumerate(zip(concepts, sizes, strict=True))
        )
        notes += describe_rounded(concepts, size_step)
    return DataPlan(
        datasets=datasets, validation=(), processes=processes, prior_loss_weight=1.0, from_file=True, notes=tuple(notes)
    )


def describe_rounded(concepts: Sequence[Concept], step: int) -> list[str]:
    """A line for each resolution that is rounded down."""
    lines: dict[str, None] = {}
    for width, height in dict.fromkeys(concept.resolution for concept in concepts):
        used = round_down(width, step), round_down(height, step)
        if used != (width, height):
            lines[f"the resolution {width}x{height} becomes {used[0]}x{used[1]}, multiples of {step}"] = None
    return list(lines)


def list_concept_sizes(concept: Concept, step: int) -> list[Size]:
    """The sizes that a concept is trained at; with dynamic_resolution all from half of the resolution to below it."""
    width, height = concept.resolution
    if not concept.dynamic_resolution:
        return [(round_down(width, step), round_down(height, step))]
    unit = math.lcm(DYNAMIC_STEP, step)
    sides = [range(round_down(side // 2, unit), max(side, unit + 1), unit) for side in (width, height)]
    return [(w, h) for w in sides[0] for h in sides[1]]


def plan_concept(path: Path, number: int, concept: Concept, sizes: Sequence[Size], times: int) -> DatasetPlan:
    """times: how often each size comes in an epoch, so that all concepts come about equally often."""
    settings = SubsetSettings(
        where=f"{path}: {number + 1}", image_dir=None, metadata_file=path, is_reg=False, class_tokens=None,
        num_repeats=times * concept.batch_size, caption_extension="", caption_extension_given=False,
        conditioning_data_dir=None, reference_data_dirs=(), images=ImageRules(), validation_split=0.0,
        validation_seed=None, rules=CaptionRules(), concept=concept,
    )  # fmt: skip
    rows = [ImageRow(f"{path.name}#{number + 1}", 0, 0, *size, concept.target) for size in sizes]
    items = Items.from_images(ImageTable.from_rows(rows), lambda size: BucketChoice(bucket=size, resized=size))
    return DatasetPlan(
        settings=DatasetSettings(
            where=settings.where, batch_size=concept.batch_size, buckets=Buckets(resolution=sizes[-1]),
            network_multiplier=concept.multiplier, skip_image_resolution=None, subsets=(settings,),
        ),
        subsets=(SubsetPlan(settings=settings, items=items, repeats=(settings.num_repeats,) * len(rows)),),
    )  # fmt: skip
