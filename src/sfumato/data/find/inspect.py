"""A dataset looked at more closely than at every start: each file decoded, each caption counted. Writes nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.data.buckets import Size
from sfumato.data.find.verify_images import Progress, faults_of
from sfumato.data.plans import DataPlan, DatasetPlan, Item, SubsetPlan
from sfumato.data.prompt_weighting import parse, plain
from sfumato.data.ss_metadata import tags
from sfumato.data.variants import longest_form
from sfumato.errors import UserError

ENDINGS = (".txt", ".caption", ".json")  # of caption files, besides the configured one
COMMON_TAGS = 40

CountTokens = Callable[[Sequence[str]], list[int]]  # captions -> tokens of each, begin and end not counted


def inspect(
    plan: DataPlan,
    tokenizers: Mapping[str, tuple[CountTokens, int]],
    *,
    weighted: bool = False,
    decoding: bool = True,
    workers: int = 2,
    progress: Progress | None = None,
) -> list[DatasetFindings]:
    """What there is in every dataset of a plan that was made with faults left out.

    tokenizers: name -> how tokens are counted, and how many the model takes. weighted: brackets in captions are no
    words. decoding: read every picture to its last byte, not only its header.
    """
    used = {item.picture.path: item.picture for _, _, item in plan.used()}
    asked = list(used.values()) if decoding else []
    faults = zip(asked, faults_of(asked, workers=workers, progress=progress), strict=True)
    broken = {picture.path: reason(fault, picture.path) for picture, fault in faults if fault is not None}
    return [
        DatasetFindings(
            name=f"dataset {i}" if len(plan.datasets) > 1 else "dataset",
            plan=dataset,
            subsets=[
                of_subset(subset, tokenizers, broken, bad_images(plan, subset), weighted=weighted)
                for subset in dataset.subsets
            ],
            enlarged=enlarged(dataset),
        )
        for i, dataset in enumerate(plan.datasets, 1)
    ]


def of_subset(
    subset: SubsetPlan,
    tokenizers: Mapping[str, tuple[CountTokens, int]],
    broken: Mapping[str, str],
    bad: Sequence[str],
    *,
    weighted: bool,
) -> SubsetFindings:
    items = list(subset.items)
    paths = [item.picture.path for item in items]
    damaged = {path: broken[path] for path in paths if path in broken}
    captions = [longest_form(item, subset) for item in items]
    captions = [plain(parse(caption)) for caption in captions] if weighted else captions
    frequencies = Counter(tags(subset))
    return SubsetFindings(
        plan=subset,
        no_images=bad,
        damaged=damaged,
        endings=caption_endings(paths, subset.settings.caption_extension),
        empty=[item.picture.path for item in items if not item.picture.caption],
        class_tokens=sum(1 for item in items if item.picture.caption == subset.settings.class_tokens),
        masks=masks_of(items, subset),
        tags=frequencies.most_common(COMMON_TAGS),
        distinct_tags=len(frequencies),
        tokens={name: counted(captions, count, limit) for name, (count, limit) in tokenizers.items() if captions},
    )


def bad_images(plan: DataPlan, subset: SubsetPlan) -> list[str]:
    """The image files of a subset, masks among them, that cannot be trained on, each with the reason."""
    where, place = subset.settings.where, os.path.abspath(subset.settings.place)  # noqa: PTH100 -- as pictures are named
    found = [(name, line) for name, lines in plan.bad_images.items() for line in lines]
    return [
        line.removeprefix(f"{place}{os.sep}") for name, line in found if name == where or name.startswith(f"{where}: ")
    ]


def reason(error: UserError, path: str) -> str:
    return error.what.removeprefix(path).strip()


def caption_endings(paths: Sequence[str], configured: str) -> dict[str, int]:
    """How many pictures have a file of their own name with each ending beside them."""
    wanted = list(dict.fromkeys((configured, *ENDINGS)))
    beside: dict[str, set[str]] = {}
    counts = dict.fromkeys(wanted, 0)
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in beside:
            beside[folder] = {each.name for each in Path(folder).iterdir()} if Path(folder).is_dir() else set()
        for ending in wanted:
            counts[ending] += name[: name.rfind(".")] + ending in beside[folder]
    return {ending: count for ending, count in counts.items() if count}


def masks_of(items: Sequence[Item], subset: SubsetPlan) -> str:
    rules = subset.settings.images
    paired = sum(item.conditioning is not None for item in items)
    if paired:
        what = "mask" if rules.masked_loss else "control image"
        return f"{paired} of {len(items)} images have a {what} in {subset.settings.conditioning_data_dir}"
    return "the alpha channel of each image that has one" if rules.alpha_mask else ""


def counted(captions: Sequence[str], count: CountTokens, limit: int) -> Tokens:
    lengths = count(captions)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    over = sum(length > limit for length in lengths)
    return Tokens(limit=limit, over=over, longest=lengths[longest], caption=captions[longest])


def enlarged(dataset: DatasetPlan) -> Counter[Size]:
    """Images of each bucket that are made larger than they are."""
    found: Counter[Size] = Counter()
    for subset in dataset.subsets:
        for item in subset.items:
            (width, height), (old_width, old_height) = item.choice.resized, item.size
            found[item.choice.bucket] += width > old_width or height > old_height
    return found


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How captions fit one tokenizer."""

    limit: int
    over: int  # captions that are cut
    longest: int
    caption: str  # the longest one


@dataclass(frozen=True, kw_only=True)
class SubsetFindings:
    """One folder."""

    plan: SubsetPlan
    no_images: Sequence[str]  # files that look like images and cannot be trained on, each with the reason
    damaged: Mapping[str, str]  # pictures that have a header and cannot be decoded -> why
    endings: Mapping[str, int]  # ending of caption files -> pictures that have one
    empty: Sequence[str]  # pictures whose caption is empty
    class_tokens: int  # pictures whose caption is the class tokens
    masks: str  # where they come from; "" where there are none
    tags: Sequence[tuple[str, int]]  # the most frequent
    distinct_tags: int
    tokens: Mapping[str, Tokens]

    @property
    def name(self) -> str:
        return str(self.plan.settings.place)


@dataclass(frozen=True, kw_only=True)
class DatasetFindings:
    """Folders that share batches."""

    name: str
    plan: DatasetPlan
    subsets: Sequence[SubsetFindings]
    enlarged: Mapping[Size, int]
