"""Which mask or control image belongs to which picture: the one of the same name in another folder."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfumato.config.paths import neighbour
from sfumato.data.find.folders import list_below, list_folder, read_images
from sfumato.data.find.image_table import Column, Pictures
from sfumato.data.find.index import Index
from sfumato.data.find.policy import Policy, some, usable
from sfumato.data.find.report import Report
from sfumato.data.find.settings import SubsetSettings
from sfumato.data.find.verify_images import undamaged

FIX = "each picture needs exactly one, of its name and shape"


def with_conditioning(pictures: Pictures, subset: SubsetSettings, policy: Policy, report: Report) -> Pictures:
    """The pictures that have a partner, each with it; all of them where none are asked for.

    Faults go to the report's problems: a picture without a partner, two of one name, one of another shape.
    """
    if subset.conditioning_data_dir is None or not len(pictures):
        return pictures
    folder = os.path.abspath(subset.conditioning_data_dir)  # noqa: PTH100 -- keeps symbolic links, unlike resolve
    try:
        names = images_in(folder)
    except OSError as error:
        what = f"{subset.where}: conditioning_data_dir {folder} cannot be read ({error.strerror})"
        report.problems.add(what, fix=neighbour(Path(folder)))
        return pictures
    images = read_images(folder, names, Index(policy.cache_dir, ("images", folder)))
    where = f"{subset.where}: {folder}"
    good = usable(images, where, policy, report)
    good = good[undamaged(images.pictures(folder, good), where, policy, report)]
    partners = partners_of(pictures, names)
    alone = pictures.take(np.flatnonzero(partners < 0)).names
    refuse(alone, f"{subset.where}: %d pictures have no image of the same name in {folder}", report)
    counts = Counter(map(stem_of, names))
    doubled = [name for name in names if counts[stem_of(name)] > 1]
    refuse(doubled, f"{subset.where}: %d images in {folder} have the name of another one there", report)
    kept = np.flatnonzero(np.isin(partners, good))
    found = pictures.take(kept).paired_with(images.pictures(folder, partners[kept]))
    unlike = found.take(np.flatnonzero(~same_shape(found)))
    refuse(unlike.names, f"{subset.where}: %d pictures have another shape than their image in {folder}", report)
    return found


def partners_of(pictures: Pictures, names: Sequence[str]) -> Column:
    """The place in `names` of each picture's partner, -1 for none.

    Folders below count as part of the name, unless no two pictures have the same one without them.
    """
    stems = [stem_of(name) for name in pictures.names]
    last = [each.replace(os.sep, "/").rpartition("/")[2] for each in stems]
    by_stem = {stem_of(name): place for place, name in enumerate(names)}
    if len(set(last)) == len(last) and not set(stems) <= set(by_stem):
        stems = last
    return np.array([by_stem.get(each, -1) for each in stems], np.int64)


def same_shape(pictures: Pictures) -> NDArray[np.bool_]:
    """For each whether its partner is it made larger or smaller, but for the rounding of a side to whole pixels."""
    other = pictures.conditioning
    assert other is not None
    swap = pictures.widths > other.widths
    short = [np.where(swap, theirs, ours) for ours, theirs in sides(pictures, other)]
    long = [np.where(swap, ours, theirs) for ours, theirs in sides(pictures, other)]
    fits = [np.abs(short[i] * long[1 - i] / long[i] - short[1 - i]) <= 1 for i in (0, 1)]
    return fits[0] | fits[1]


def sides(pictures: Pictures, other: Pictures) -> list[tuple[Column, Column]]:
    return [(pictures.widths, other.widths), (pictures.heights, other.heights)]


def refuse_spare(found: Iterable[tuple[SubsetSettings, Pictures]], report: Report) -> None:
    """A conditioning image that belongs to no picture of any subset is a fault: its picture was meant to be there."""
    stems: defaultdict[Path, set[str]] = defaultdict(set)
    first: dict[Path, str] = {}
    for subset, pictures in found:
        folder = subset.conditioning_data_dir
        if folder is not None and folder.is_dir() and len(pictures):
            first.setdefault(folder, subset.where)
            for name in map(stem_of, (*pictures.names, *report.left_out[subset.where])):
                stems[folder] |= {name, name.replace(os.sep, "/").rpartition("/")[2]}
    for folder, known in stems.items():
        spare = [name for name in images_in(os.path.abspath(folder)) if stem_of(name) not in known]  # noqa: PTH100
        refuse(spare, f"{first[folder]}: %d images in {folder} have no picture of the same name", report)


def images_in(folder: str) -> list[str]:
    """The images directly in the folder, else those below it."""
    return list_folder(folder).images or list_below(folder).images


def refuse(names: Sequence[str], what: str, report: Report) -> None:
    """One fault for all of them, the first few named."""
    if len(names):
        report.problems.add(f"{what % len(names)}: {some(names)}", fix=FIX)


def stem_of(name: str) -> str:
    return name[: name.rfind(".")]
