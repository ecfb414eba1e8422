"""Which mask or control image belongs to which image: the one of the same name in another folder."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfumato.common.text import list_some
from sfumato.config.paths import suggest_path
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import Listing, list_folder, list_recursively, read_images
from sfumato.data.find.image_notes import report_unread
from sfumato.data.find.image_table import ImageTable, IntColumn
from sfumato.data.find.policy import Policy, select_valid_images
from sfumato.data.find.settings import SubsetSettings
from sfumato.data.find.verify_images import find_decodable


def attach_conditioning_images(
    images: ImageTable, subset: SubsetSettings, policy: Policy, findings: Findings
) -> ImageTable:
    """The images that have a conditioning image, each with it; all images where the subset has no such folder.

    Adds a problem for an image without one, for two of the same name and for one of another shape.
    """
    if subset.conditioning_data_dir is None or not len(images):
        return images
    folder = os.path.abspath(subset.conditioning_data_dir)  # noqa: PTH100 -- keeps symbolic links, unlike resolve
    try:
        listing = list_images(folder)
    except OSError as error:
        findings.problems.add(
            f"{subset.where}: conditioning_data_dir {folder} cannot be read ({error.strerror})",
            code="conditioning-folder-unreadable",
            fix=suggest_path(Path(folder)),
        )
        return images
    names = listing.images
    report_unread(listing.unread, f"{subset.where}: {folder}", findings)
    headers = read_images(folder, names, policy.index("images", folder))
    where = f"{subset.where}: {folder}"
    valid = select_valid_images(headers, where, policy, findings)
    valid = valid[find_decodable(headers.make_table(folder, valid), where, policy, findings)]
    partners = match_by_stem(images, names)
    rows = np.flatnonzero(np.isin(partners, valid))
    paired = images.take(rows).with_conditioning(headers.make_table(folder, partners[rows]))
    check_partner_names(images.take(np.flatnonzero(partners < 0)).names, names, subset, folder, findings)
    misshapen = paired.take(np.flatnonzero(~compare_shapes(paired))).names
    if len(misshapen):
        findings.problems.add(
            f"{subset.where}: the conditioning image in {folder} has another shape than the image for "
            f"{len(misshapen)} images: {list_some(misshapen)}",
            code="conditioning-image-shape-mismatch",
            fix="give each image a conditioning image of its own shape",
        )
    return paired


def check_partner_names(
    unmatched: Sequence[str], names: Sequence[str], subset: SubsetSettings, folder: str, findings: Findings
) -> None:
    """unmatched: images without a conditioning image. names: of the conditioning images."""
    if len(unmatched):
        findings.problems.add(
            f"{subset.where}: {len(unmatched)} images have no image of the same name in {folder}: "
            f"{list_some(unmatched)}",
            code="conditioning-image-missing",
            fix="give each image one conditioning image of its name",
        )
    counts = Counter(map(strip_extension, names))
    repeated = [name for name in names if counts[strip_extension(name)] > 1]
    if repeated:
        findings.problems.add(
            f"{subset.where}: {len(repeated)} images in {folder} differ only in their extension: {list_some(repeated)}",
            code="conditioning-image-ambiguous",
            fix="keep one conditioning image per name",
        )


def match_by_stem(images: ImageTable, names: Sequence[str]) -> IntColumn:
    """For each image the index of its conditioning image in `names`, -1 for none.

    Subfolders count as part of the name, unless no two images have the same name without them.
    """
    stems = [strip_extension(name) for name in images.names]
    last_parts = [strip_folders(stem) for stem in stems]
    by_stem = {strip_extension(name): index for index, name in enumerate(names)}
    if len(set(last_parts)) == len(last_parts) and not set(stems) <= set(by_stem):
        stems = last_parts
    if not set(stems) <= set(by_stem):  # names that differ in capital letters only are one name on most systems
        own = set(stems)
        free = {stem.lower(): index for stem, index in by_stem.items() if stem not in own}
        return np.array([by_stem.get(stem, free.get(stem.lower(), -1)) for stem in stems], np.int64)
    return np.array([by_stem[stem] for stem in stems], np.int64)


def compare_shapes(images: ImageTable) -> NDArray[np.bool_]:
    """For each image whether its conditioning image has its shape: equal sides to a pixel after scaling."""
    other = images.conditioning
    assert other is not None
    swap = images.widths > other.widths
    pairs = [(images.widths, other.widths), (images.heights, other.heights)]
    short = [np.where(swap, theirs, ours) for ours, theirs in pairs]
    long = [np.where(swap, ours, theirs) for ours, theirs in pairs]
    matches = [np.abs(short[i] * long[1 - i] / long[i] - short[1 - i]) <= 1 for i in (0, 1)]
    return matches[0] | matches[1]


def check_unmatched_images(subsets: Iterable[tuple[SubsetSettings, ImageTable]], findings: Findings) -> None:
    """A conditioning image that belongs to no image of any subset is a problem: its image is missing."""
    stems: defaultdict[Path, set[str]] = defaultdict(set)
    labels: dict[Path, str] = {}
    for subset, images in subsets:
        folder = subset.conditioning_data_dir
        if folder is not None and folder.is_dir() and len(images):
            labels.setdefault(folder, subset.where)
            for stem in map(strip_extension, (*images.names, *findings.skipped_names[subset.where])):
                stems[folder] |= {stem.lower(), strip_folders(stem).lower()}
    for folder, known in stems.items():
        names = list_images(os.path.abspath(folder)).images  # noqa: PTH100
        unmatched = [name for name in names if strip_extension(name).lower() not in known]
        if unmatched:
            findings.problems.add(
                f"{labels[folder]}: {len(unmatched)} images in {folder} have no training image of the same name: "
                f"{list_some(unmatched)}",
                code="conditioning-image-unmatched",
                fix="remove them, or add the training images",
            )


def list_images(folder: str) -> Listing:
    """The files directly in the folder, or those in its subfolders where it has no images itself."""
    listing = list_folder(folder)
    return listing if listing.images or not listing.folders else list_recursively(folder)


def strip_extension(name: str) -> str:
    return name[: name.rfind(".")]


def strip_folders(name: str) -> str:
    return name.replace(os.sep, "/").rpartition("/")[2]
