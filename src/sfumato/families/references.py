"""Whether the dataset's reference images are what the model takes, or the method: those of pairs."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.common.text import plural
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems
from sfumato.families.base import FAMILIES, Family
from sfumato.families.source import Source


def check_reference_folders(family: type[Family], source: Source, data: DataPlan, problems: Problems) -> None:
    """Add a problem for each subset with more reference images than the model takes."""
    taken = family.num_references
    others = [FAMILIES.get(name) for name in FAMILIES.names]
    takers = [other.name for other in others if other.num_references > taken and other.detect(source)]
    fix = (
        f"give --model_type {takers[0]} if this is that model, or remove them" if takers else "remove what is too much"
    )
    for dataset in data.datasets:
        for subset in dataset.subsets:
            given = max(len(subset.settings.reference_data_dirs), len(subset.items.images.references))
            if given > taken:
                problems.add(
                    f"{subset.settings.where}: each image has {plural(given, 'reference image')}, and a model of the "
                    "family "
                    f"{family.name} takes {taken or 'none'}",
                    code="reference-images-unused",
                    fix=fix,
                )


def check_pairs(data: DataPlan, problems: Problems) -> None:
    """Add a problem for each subset whose images have no image with less of the attribute, or several."""
    for dataset in data.datasets:
        for subset in dataset.subsets:
            if len(subset.settings.reference_data_dirs) != 1:
                problems.add(
                    f"{subset.settings.where}: --method image_slider trains pairs of images, and its images have "
                    f"{len(subset.settings.reference_data_dirs) or 'no'} partners",
                    code="slider-pairs-missing",
                    fix="give one folder as --reference_data_dirs, with less of the attribute in images of equal names",
                )


def describe_references(family: type[Family], data: DataPlan) -> Iterator[str]:
    """A line where a model that takes reference images gets none."""
    if family.num_references and not data.num_references:
        yield "there are no reference images (reference_data_dirs), so the model learns from captions alone"
