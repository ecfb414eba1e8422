"""A close look at a dataset: every file decoded, every caption tokenized. Writes nothing but the dataset index."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sfumato.common.text import plural
from sfumato.data.buckets import Size
from sfumato.data.find.data_rows import count_enlarged
from sfumato.data.find.image_table import ImageTable
from sfumato.data.find.index import Index
from sfumato.data.find.verify_images import OPAQUE, DecodeCallback, check_pixels, list_origins
from sfumato.data.plans import DataPlan, DatasetPlan, Item, SubsetPlan
from sfumato.data.prompt_weighting import parse_weights, strip_weights
from sfumato.data.ss_metadata import count_tags
from sfumato.data.variants import make_longest_variant

CAPTION_EXTENSIONS = (".txt", ".caption", ".json")  # besides the configured one
COMMON_TAGS = 40

CountTokens = Callable[[Sequence[str]], list[int]]  # captions -> tokens of each, without begin and end


def inspect_plan(
    plan: DataPlan,
    tokenizers: Mapping[str, tuple[CountTokens, int]],
    *,
    cache_dir: Path,
    weighted: bool = False,
    decoding: bool = True,
    workers: int = 2,
    progress: DecodeCallback | None = None,
) -> list[DatasetInspection]:
    """Inspects every dataset of a plan that was made with faulty images skipped.

    tokenizers: name -> (counts tokens, how many the model takes). cache_dir: where it is stored which images were
    whole. weighted: captions have weights in brackets. decoding: decode every image completely, not only its header.
    """
    pixels: dict[str, SubsetPixels] = {}
    if decoding:
        pixels = check_all_pixels(plan, cache_dir=cache_dir, workers=workers, progress=progress)
    inspections: list[DatasetInspection] = []
    for i, dataset in enumerate(plan.datasets, 1):
        subsets: list[SubsetInspection] = []
        for subset in dataset.subsets:
            bad = list_bad_images(plan, subset)
            found = pixels.get(subset.settings.where, SubsetPixels())
            subsets.append(inspect_subset(subset, tokenizers, found, bad, weighted=weighted))
        name = f"dataset {i}" if len(plan.datasets) > 1 else "dataset"
        enlarged = count_enlarged(dataset)
        inspections.append(DatasetInspection(name=name, plan=dataset, subsets=subsets, enlarged=enlarged))
    return inspections


def check_all_pixels(
    plan: DataPlan, *, cache_dir: Path, workers: int, progress: DecodeCallback | None
) -> dict[str, SubsetPixels]:
    """By subset what decoding shows of its images, of those held out for validation, and of masks and references."""
    tables = [table for dataset in (*plan.datasets, *plan.validation) for table in list_tables(dataset)]
    total, done = sum(len(images) for _, _, images in tables), 0
    pixels: dict[str, SubsetPixels] = {}
    for subset, role, images in tables:

        def report(count: int, of: int, before: int = done + len(images)) -> None:
            if progress is not None:
                progress(before - of + count, total)

        index = Index(cache_dir, ("decoded", *list_origins(images, subset + role)))
        check = check_pixels(images, index, workers=workers, progress=report)
        done += len(images)
        report(0, 0, done)
        found = pixels.setdefault(subset, SubsetPixels())
        for row, fault in check.faults.items():
            path = images.get_row(row).path
            found.damaged[path] = fault.what.removeprefix(path).strip()
        if not role:
            transparent = np.flatnonzero(check.lowest_alpha < OPAQUE).tolist()
            found.transparent.extend(images.names.get_row(row) for row in transparent)
    return pixels


def list_tables(dataset: DatasetPlan) -> Iterator[tuple[str, str, ImageTable]]:
    """Where a subset is, what its images of this table are beside the trained ones ("" for those), the table."""
    for subset in dataset.subsets:
        where, images = subset.settings.where, subset.items.images
        yield where, "", images
        if images.conditioning is not None:
            yield where, ": masks", images.conditioning
        for references in images.references:
            yield where, ": reference images", references


def inspect_subset(
    subset: SubsetPlan,
    tokenizers: Mapping[str, tuple[CountTokens, int]],
    pixels: SubsetPixels,
    bad: Sequence[str],
    *,
    weighted: bool,
) -> SubsetInspection:
    """pixels: what decoding showed. bad: faults of images without a valid header."""
    items = list(subset.items)
    paths = [item.image.path for item in items]
    captions = [make_longest_variant(item.image.caption, subset.settings.rules) for item in items]
    if weighted:
        captions = [strip_weights(parse_weights(caption)) for caption in captions]
    tokens: dict[str, TokenStatistics] = {}
    if captions:
        tokens = {name: measure_captions(captions, count, limit) for name, (count, limit) in tokenizers.items()}
    tags = Counter(count_tags(subset))
    return SubsetInspection(
        plan=subset,
        no_images=bad,
        damaged=pixels.damaged,
        transparent=pixels.transparent,
        caption_extensions=count_caption_files(paths, subset.settings.caption_extension),
        empty=[item.image.path for item in items if not item.image.caption],
        class_tokens=sum(1 for item in items if item.image.caption == subset.settings.class_tokens),
        masks=describe_masks(items, subset),
        references=describe_reference_folders(subset),
        tags=tags.most_common(COMMON_TAGS),
        distinct_tags=len(tags),
        tokens=tokens,
    )


def list_bad_images(plan: DataPlan, subset: SubsetPlan) -> list[str]:
    """The faults of a subset's image files, masks included, that cannot be trained on."""
    where = subset.settings.where
    prefix = os.path.abspath(subset.settings.source) + os.sep  # noqa: PTH100 -- same form as the images' paths
    faults: list[str] = []
    for name, lines in plan.bad_images.items():
        if name == where or name.startswith(f"{where}: "):
            faults += [line.removeprefix(prefix) for line in lines]
    return faults


def count_caption_files(paths: Sequence[str], configured: str) -> dict[str, int]:
    """Extension of caption files -> how many images have a file of their own name with it."""
    extensions = list(dict.fromkeys((configured, *CAPTION_EXTENSIONS)))
    folder_names: dict[str, set[str]] = {}
    counts = dict.fromkeys(extensions, 0)
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folder_names:
            is_folder = Path(folder).is_dir()  # else an archive
            folder_names[folder] = {file.name.lower() for file in Path(folder).iterdir()} if is_folder else set()
        stem = name[: name.rfind(".")].lower()
        for extension in extensions:
            counts[extension] += stem + extension.lower() in folder_names[folder]
    return {extension: count for extension, count in counts.items() if count}


def describe_masks(items: Sequence[Item], subset: SubsetPlan) -> str:
    """Where a subset's masks or control images come from; "" where there are none."""
    rules = subset.settings.images
    paired = sum(item.conditioning is not None for item in items)
    if paired:
        what = "mask" if rules.masked_loss else "control image"
        folder = subset.settings.conditioning_data_dir
        return (
            f"{paired} of {plural(len(items), 'image has', 'images have')} a {what} "
            f"{f'in {folder}' if folder else 'by their metadata'}"
        )
    return "the alpha channel of each image that has one" if rules.alpha_mask else ""


def describe_reference_folders(subset: SubsetPlan) -> str:
    """Where a subset's reference images come from; "" where there are none."""
    count, folders = len(subset.items.images.references), subset.settings.reference_data_dirs
    named = [f"one in {folder}" for folder in folders] + ["one by its metadata"] * (count - len(folders))
    return f"each image has {' and '.join(named)}" if count else ""


def measure_captions(captions: Sequence[str], count: CountTokens, limit: int) -> TokenStatistics:
    lengths = count(captions)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    over = sum(length > limit for length in lengths)
    return TokenStatistics(limit=limit, over=over, longest=lengths[longest], caption=captions[longest])


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Caption lengths in tokens of one tokenizer."""

    limit: int
    over: int  # captions that are cut
    longest: int
    caption: str  # the longest one


@dataclass(frozen=True, kw_only=True)
class SubsetPixels:
    """What decoding the images of a subset showed."""

    damaged: dict[str, str] = field(default_factory=dict)  # path -> what is wrong
    transparent: list[str] = field(default_factory=list)  # names of images with transparent parts


@dataclass(frozen=True, kw_only=True)
class SubsetInspection:
    """One subset."""

    plan: SubsetPlan
    no_images: Sequence[str]  # faults of files with an image extension that have no valid image header
    damaged: Mapping[str, str]  # images with a valid header that cannot be decoded -> fault
    transparent: Sequence[str]  # images with transparent parts; empty where nothing was decoded
    caption_extensions: Mapping[str, int]  # extension of caption files -> images that have one
    empty: Sequence[str]  # images with an empty caption
    class_tokens: int  # images whose caption is the class tokens
    masks: str  # where they, or control images, come from; "" where there are none
    references: str  # the same for reference images
    tags: Sequence[tuple[str, int]]  # the most frequent
    distinct_tags: int
    tokens: Mapping[str, TokenStatistics]  # by tokenizer

    @property
    def name(self) -> str:
        return str(self.plan.settings.source)

    @property
    def masks_name(self) -> str:
        """What `masks` describes."""
        rules = self.plan.settings.images
        return "masks" if rules.masked_loss or rules.alpha_mask else "control images"


@dataclass(frozen=True, kw_only=True)
class DatasetInspection:
    """Subsets that share batches."""

    name: str
    plan: DatasetPlan
    subsets: Sequence[SubsetInspection]
    enlarged: Mapping[Size, int]  # images of each bucket that are enlarged
