"""The pictures of one subset, from wherever they come; every fault is told, none is passed over."""

from __future__ import annotations

import os
from pathlib import Path

from sfumato.config.paths import neighbour
from sfumato.data.find.caption_files import captions_beside, paired
from sfumato.data.find.folders import Listing, list_below, list_folder, read_images, what_is_there
from sfumato.data.find.image_table import Pictures
from sfumato.data.find.index import Index
from sfumato.data.find.metadata_source import of_metadata, of_plugin
from sfumato.data.find.policy import Policy, some, usable
from sfumato.data.find.report import Report
from sfumato.data.find.settings import REMEMBERED, SubsetSettings
from sfumato.data.find.tar_source import are_shards, of_shards


def pictures_of(subset: SubsetSettings, policy: Policy, report: Report) -> Pictures:
    """All pictures of the subset, each with its caption.

    Faults go to the report's problems; what remains is returned, so that later stages can find theirs, too.
    """
    if subset.dataset_class:
        return of_plugin(subset, policy, report)
    if subset.metadata_file is not None:
        return of_metadata(subset.metadata_file, subset, policy, report)
    if are_shards(subset.place):
        return of_shards(subset, policy, report)
    if subset.cache_info and (subset.place / REMEMBERED).is_file():
        report.note(f"{subset.where}: images and captions are what {REMEMBERED} in it says, as cache_info asks for")
        return of_metadata(subset.place / REMEMBERED, subset, policy, report, beside=True)
    return of_folder(subset, policy, report)


def of_folder(subset: SubsetSettings, policy: Policy, report: Report) -> Pictures:
    """The pictures in a folder, sorted by name."""
    folder = os.path.abspath(subset.place)  # noqa: PTH100 -- keeps symbolic links, unlike resolve
    listing = look_in(folder, subset, report)
    if listing is None:
        return Pictures.of([])
    images = read_images(folder, listing.images, Index(policy.cache_dir, ("images", folder)))
    good = usable(images, subset.where, policy, report)
    pictures = images.pictures(folder, good)
    pairing = paired(pictures.names, listing.others, subset, report)
    del listing, images  # a million names take some 100 MB
    wanted = captions_beside(pictures.names, pairing, folder, subset, policy, report)
    return pictures.captioned(wanted.captions, wanted.keep)


def look_in(folder: str, subset: SubsetSettings, report: Report) -> Listing | None:
    """The images directly in the folder; where there are none, all in the folders below; None with a fault told."""
    try:
        listing = list_folder(folder)
    except OSError as error:
        report.problems.add(f"{subset.where}: {folder} cannot be read ({error.strerror})", fix=neighbour(Path(folder)))
        return None
    below = list_below(folder) if listing.folders else None
    if listing.images:
        if below and below.images:
            report.note(
                f"{subset.where}: {folder} holds images itself, so the {len(below.images)} in the folders below it "
                f"({some(below.images)}) are left out"
            )
        return listing
    if below and below.images:
        report.note(f"{subset.where}: the {len(below.images)} images in the folders below {folder} are taken")
        return below
    report.problems.add(f"{subset.where}: no images in {folder}; {what_is_there(listing)}", fix="check the path")
    return None
