"""Which mask or control image belongs to which picture: the one of the same name in another folder."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from sfumato.data.buckets import Size
from sfumato.data.folders import list_folder, read_images
from sfumato.data.index import FolderIndex, load_index, save_index
from sfumato.data.settings import DatasetSettings, Report, SubsetSettings
from sfumato.data.sources import NAMED, Picture, told_of_faults
from sfumato.errors import UserError


def conditioning_of(
    subset: SubsetSettings, pictures: Sequence[Picture], cache_dir: Path, report: Report
) -> list[Picture | None]:
    """For each picture the image of the same name in the subset's conditioning folder, all None without one.

    Faults go to the report's problems: a picture without, two of one name, one of another shape.
    """
    if subset.conditioning_data_dir is None or not pictures:
        return [None] * len(pictures)
    folder = os.path.abspath(subset.conditioning_data_dir)  # noqa: PTH100 -- keeps symbolic links, unlike resolve
    told = len(report.problems.found)
    by_stem = by_name(subset, folder, cache_dir, report)
    found = [by_stem.get(stem_of(picture.path)) for picture in pictures]
    if len(report.problems.found) == told:
        missing = [picture.path for picture, other in zip(pictures, found, strict=True) if other is None]
        refuse(missing, f"{subset.where}: %d pictures have no image of the same name in {folder}", report)
        pairs = zip(pictures, found, strict=True)
        unlike = [other.path for picture, other in pairs if other is not None and not same_shape(picture, other)]
        refuse(unlike, f"{subset.where}: %d images in {folder} have another shape than their picture", report)
    return found


def by_name(subset: SubsetSettings, folder: str, cache_dir: Path, report: Report) -> dict[str, Picture]:
    """The images of a conditioning folder by the stem of their name."""
    try:
        names = list_folder(folder).images
    except OSError as error:
        what = f"{subset.where}: conditioning_data_dir {folder} cannot be read ({error.strerror})"
        report.problems.add(what, fix="check the path")
        return {}
    known = load_index(cache_dir, folder)
    images = read_images(folder, names, known.images)
    told_of_faults(list(images.faults.values()), f"{subset.where}: {folder}", report)
    if images.new or len(images.by_name) != len(known.images):
        save_index(cache_dir, folder, FolderIndex(images.by_name, known.captions))
    found: dict[str, Picture] = {}
    doubled: list[str] = []
    for name, facts in images.by_name.items():
        if stem_of(name) in found:
            doubled.append(name)
        found[stem_of(name)] = Picture(folder + os.sep + name, *facts, "")
    refuse(doubled, f"{subset.where}: %d images in {folder} have the name of another one there", report)
    return found


def refuse_unpaired(datasets: Iterable[DatasetSettings], report: Report) -> None:
    """A conditioning image that belongs to no picture of any subset is a fault: its picture was meant to be there."""
    sharing: defaultdict[Path, list[SubsetSettings]] = defaultdict(list)
    for dataset in datasets:
        for subset in dataset.subsets:
            if subset.conditioning_data_dir is not None:
                sharing[subset.conditioning_data_dir].append(subset)
    for folder, subsets in sharing.items():
        stems = {stem_of(name) for subset in subsets for name in images_in(subset.image_dir)}
        spare = [name for name in images_in(folder) if stem_of(name) not in stems]
        refuse(spare, f"{subsets[0].where}: %d images in {folder} have no picture of the same name", report)


def images_in(folder: Path) -> list[str]:
    try:
        return list_folder(str(folder)).images
    except OSError:  # told elsewhere
        return []


def refuse(names: Sequence[str], what: str, report: Report) -> None:
    """One fault for all of them, the first few named."""
    if names:
        some = ", ".join(PurePath(name).name for name in names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        report.problems.found.append(UserError(f"{what % len(names)}: {some}", fix="each picture needs exactly one"))


def stem_of(name: str) -> str:
    return PurePath(name).stem


def same_shape(picture: Picture, other: Picture) -> bool:
    """Whether one is the other made larger or smaller, but for the rounding of a side to whole pixels."""
    ours: Size = (picture.width, picture.height)
    theirs: Size = (other.width, other.height)
    short, long = sorted((ours, theirs), key=lambda size: size[0])
    return any(abs(short[i] * long[1 - i] / long[i] - short[1 - i]) <= 1 for i in (0, 1))
