"""Which mask, control or reference images belong to an image: those of its name in other folders."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfumato.common.text import list_some, plural
from sfumato.config.paths import suggest_path
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import Listing, list_folder, list_recursively, read_images
from sfumato.data.find.image_notes import report_unread
from sfumato.data.find.image_table import ImageTable, IntColumn
from sfumato.data.find.partner_folders import PartnerFolder, list_partner_folders
from sfumato.data.find.policy import Policy, select_valid_images
from sfumato.data.find.settings import SubsetSettings
from sfumato.data.find.verify_images import find_decodable


def attach_partner_images(images: ImageTable, subset: SubsetSettings, policy: Policy, findings: Findings) -> ImageTable:
    """The images that have a mask or control image and every reference image, each with them.

    Adds a problem for an image without one and for two of the same name; for a mask or control image of another shape,
    too, while reference images of another shape are noted, since they are cropped.
    """
    for partner in list_partner_folders(subset) if len(images) else ():
        images = attach_partners(images, partner, subset, policy, findings)
    return images


def attach_partners(
    images: ImageTable, partner: PartnerFolder, subset: SubsetSettings, policy: Policy, findings: Findings
) -> ImageTable:
    """The images that have one in this folder; all of them where it cannot be read, which is a problem."""
    folder = os.path.abspath(partner.folder)  # noqa: PTH100 -- keeps symbolic links, unlike resolve
    try:
        listing = list_images(folder)
    except OSError as error:
        findings.problems.add(
            f"{subset.where}: {partner.key} {folder} cannot be read ({error.strerror})",
            code="conditioning-folder-unreadable",
            fix=suggest_path(Path(folder)),
        )
        return images
    names = listing.images
    where = f"{subset.where}: {folder}"
    report_unread(listing.unread, where, findings)
    headers = read_images(folder, names, policy.index("images", folder))
    valid = select_valid_images(headers, where, policy, findings)
    valid = valid[find_decodable(headers.make_table(folder, valid), where, policy, findings)]
    partners = match_by_stem(images, names)
    rows = np.flatnonzero(np.isin(partners, valid))
    found = headers.make_table(folder, partners[rows])
    check_partner_names(images.take(np.flatnonzero(partners < 0)).names, names, partner, subset, findings)
    paired = images.take(rows)
    misshapen = paired.take(np.flatnonzero(~compare_shapes(paired, found))).names
    if len(misshapen):
        report_misshapen(misshapen, partner, subset, findings)
    if partner.is_reference:
        return paired.with_references((*paired.references, found))
    return paired.with_conditioning(found)


def report_misshapen(names: Sequence[str], partner: PartnerFolder, subset: SubsetSettings, findings: Findings) -> None:
    """names: of the images whose partner has another shape."""
    if partner.is_reference:
        findings.note(
            f"{subset.where}: the reference image in {partner.folder} has another shape than the image, and is cropped "
            f"to it, for {plural(len(names), 'image')}: {list_some(names)}"
        )
        return
    findings.problems.add(
        f"{subset.where}: the conditioning image in {partner.folder} has another shape than the image for "
        f"{plural(len(names), 'image')}: {list_some(names)}",
        code="conditioning-image-shape-mismatch",
        fix="give each image a conditioning image of its own shape",
    )


def check_partner_names(
    unmatched: Sequence[str], names: Sequence[str], partner: PartnerFolder, subset: SubsetSettings, findings: Findings
) -> None:
    """unmatched: images without a partner. names: of the images in the partners' folder."""
    if len(unmatched):
        findings.problems.add(
            f"{subset.where}: {plural(len(unmatched), 'image has', 'images have')} no {partner.noun} of the same name "
            f"in {partner.folder}: "
            f"{list_some(unmatched)}",
            code="conditioning-image-missing",
            fix=f"give each image one {partner.noun} of its name",
        )
    counts = Counter(map(strip_extension, names))
    repeated = [name for name in names if counts[strip_extension(name)] > 1]
    if repeated:
        findings.problems.add(
            f"{subset.where}: {plural(len(repeated), 'image')} in {partner.folder} differ only in their extension: "
            f"{list_some(repeated)}",
            code="conditioning-image-ambiguous",
            fix=f"keep one {partner.noun} per name",
        )


def match_by_stem(images: ImageTable, names: Sequence[str]) -> IntColumn:
    """For each image the index of its partner in `names`, -1 for none.

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


def compare_shapes(images: ImageTable, other: ImageTable) -> NDArray[np.bool_]:
    """For each image whether its partner has its shape: equal sides to a pixel after scaling."""
    swap = images.widths > other.widths
    pairs = [(images.widths, other.widths), (images.heights, other.heights)]
    short = [np.where(swap, theirs, ours) for ours, theirs in pairs]
    long = [np.where(swap, ours, theirs) for ours, theirs in pairs]
    matches = [np.abs(short[i] * long[1 - i] / long[i] - short[1 - i]) <= 1 for i in (0, 1)]
    return matches[0] | matches[1]


def check_unmatched_images(subsets: Iterable[tuple[SubsetSettings, ImageTable]], findings: Findings) -> None:
    """An image in a partners' folder that belongs to no image of any subset is a problem: its image is missing."""
    stems: defaultdict[Path, set[str]] = defaultdict(set)
    labels: dict[Path, str] = {}
    for subset, images in subsets:
        for folder in (partner.folder for partner in list_partner_folders(subset) if len(images)):
            if not folder.is_dir():
                continue
            labels.setdefault(folder, subset.where)
            for stem in map(strip_extension, (*images.names, *findings.skipped_names[subset.where])):
                stems[folder] |= {stem.lower(), strip_folders(stem).lower()}
    for folder, known in stems.items():
        names = list_images(os.path.abspath(folder)).images  # noqa: PTH100
        unmatched = [name for name in names if strip_extension(name).lower() not in known]
        if unmatched:
            findings.problems.add(
                f"{labels[folder]}: {plural(len(unmatched), 'image')} in {folder} have no training image of the same "
                "name: "
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
