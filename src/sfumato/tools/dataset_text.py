"""The report of `sfumato dataset inspect` as text: per folder the images, captions, faults, tokens and tags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sfumato.common.text import list_some, plural
from sfumato.config import Config
from sfumato.data.find.inspect import DatasetInspection, SubsetInspection
from sfumato.data.plans import DataPlan
from sfumato.training.plan_report import dataset_lines

MAX_NAMES = 10  # files and tags that a line names


def list_report_lines(config: Config, plan: DataPlan, datasets: Sequence[DatasetInspection]) -> Iterator[str]:
    """The whole report, line by line."""
    yield from dataset_lines(config, plan)
    for dataset in datasets:
        for subset in dataset.subsets:
            yield subset.name
            yield from (f"  {name:<32} {value}" for name, value in describe_subset(subset))


def describe_subset(subset: SubsetInspection) -> Iterator[tuple[str, str]]:
    """(name, value) of every fact about one folder that is worth a line."""
    settings, count = subset.plan.settings, len(subset.plan.items)
    kind = "regularization images" if settings.is_reg else "images"
    samples = f"{plural(subset.plan.num_samples, 'sample')} per epoch"
    yield kind, f"{count}, each {format_repeats(settings.num_repeats)}, {samples}"
    damaged = [f"{Path(path).name} {reason}" for path, reason in subset.damaged.items()]
    for name, files in (("not images", subset.no_images), ("damaged", damaged)):
        if files:
            yield name, "\n".join([str(len(files)), *(f"    {file}" for file in files)])
    if subset.transparent:
        yield "with transparent parts", f"{len(subset.transparent)}: {list_some(subset.transparent, MAX_NAMES)}"
    extensions = ", ".join(f"{number} {extension}" for extension, number in subset.caption_extensions.items())
    yield "caption files beside them", extensions or "none"
    if subset.class_tokens:
        yield "captions from class_tokens", f"{subset.class_tokens}: {settings.class_tokens}"
    if subset.empty:
        names = [Path(path).name for path in subset.empty]
        yield "empty captions", f"{len(names)}: {list_some(names, MAX_NAMES)}"
    if subset.masks:
        yield subset.masks_name, subset.masks
    if subset.references:
        yield "references", subset.references
    for name, tokens in subset.tokens.items():
        cut = f"{tokens.over} of {plural(count, 'caption is', 'captions are')} cut; " if tokens.over else ""
        yield f"tokens ({name})", f"{cut}the longest caption has {tokens.longest} of {tokens.limit}"
    if subset.distinct_tags:
        yield "tags", f"{subset.distinct_tags} different: {list_tags(subset)}"


def list_tags(subset: SubsetInspection) -> str:
    """The most frequent tags with their counts, and how many more there are."""
    shown = subset.tags[:MAX_NAMES]
    hidden = subset.distinct_tags - len(shown)
    return ", ".join(f"{tag} {number}" for tag, number in shown) + (f" and {hidden} more" if hidden else "")


def format_repeats(count: int) -> str:
    """once, 10 times"""
    return "once" if count == 1 else f"{count} times"
