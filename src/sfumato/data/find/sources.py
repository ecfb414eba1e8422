"""The images of one subset, from a folder, a metadata file, archives or a dataset class."""

from __future__ import annotations

import os
from pathlib import Path

from sfumato.common.text import list_some, plural
from sfumato.config.paths import suggest_path
from sfumato.data.find.caption_files import load_caption_files, pair_caption_files
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import Listing, describe_listing, list_folder, list_recursively, read_images
from sfumato.data.find.image_formats import is_image
from sfumato.data.find.image_notes import report_image_folders, report_unread
from sfumato.data.find.image_table import ImageTable
from sfumato.data.find.metadata_source import load_metadata_images, load_plugin_images
from sfumato.data.find.policy import Policy, select_valid_images
from sfumato.data.find.settings import METADATA_CACHE_NAME, SubsetSettings
from sfumato.data.find.tar_source import is_archive_path, load_archive_images


def load_images(subset: SubsetSettings, policy: Policy, findings: Findings) -> ImageTable:
    """All images of the subset, each with its caption.

    Adds what is wrong to the problems; returns what is left, so that later stages can add theirs.
    """
    if subset.dataset_class:
        return load_plugin_images(subset, policy, findings)
    if subset.metadata_file is not None:
        return load_metadata_images(subset.metadata_file, subset, policy, findings)
    if is_archive_path(subset.source):
        return load_archive_images(subset, policy, findings)
    if subset.cache_info and (subset.source / METADATA_CACHE_NAME).is_file():
        findings.note(f"{subset.where}: images and captions are those of its {METADATA_CACHE_NAME} (cache_info)")
        return load_metadata_images(subset.source / METADATA_CACHE_NAME, subset, policy, findings, beside=True)
    return load_folder_images(subset, policy, findings)


def load_folder_images(subset: SubsetSettings, policy: Policy, findings: Findings) -> ImageTable:
    """The images in a folder, sorted by name."""
    folder = os.path.abspath(subset.source)  # noqa: PTH100 -- keeps symbolic links, unlike resolve
    listing = find_images(folder, subset, findings)
    if listing is None:
        return ImageTable.from_rows([])
    report_unread(listing.unread, subset.where, findings)
    report_image_folders([name for name in listing.folders if is_image(name)], subset.where, findings)
    headers = read_images(folder, listing.images, policy.index("images", folder))
    images = headers.make_table(folder, select_valid_images(headers, subset.where, policy, findings))
    pairing = pair_caption_files(images.names, listing.others, subset, findings)
    del listing, headers  # a million names take some 100 MB
    table = load_caption_files(images.names, pairing, folder, subset, policy, findings)
    return images.with_captions(table.captions, table.kept_rows)


def find_images(folder: str, subset: SubsetSettings, findings: Findings) -> Listing | None:
    """The images directly in the folder, else all in its subfolders; None and a problem where there are none."""
    try:
        listing = list_folder(folder)
    except OSError as error:
        findings.problems.add(
            f"{subset.where}: {folder} cannot be read ({error.strerror})",
            code="subset-folder-unreadable",
            fix=suggest_path(Path(folder)),
        )
        return None
    below = list_recursively(folder) if listing.folders else None
    if listing.images:
        if below and below.images:
            findings.note(
                f"{subset.where}: {folder} holds images itself, so the {len(below.images)} in its subfolders "
                f"({list_some(below.images)}) are skipped"
            )
        return listing
    if below and below.images:
        findings.note(f"{subset.where}: using the {plural(len(below.images), 'image')} in the subfolders of {folder}")
        return below
    findings.problems.add(
        f"{subset.where}: no images in {folder}; {describe_listing(listing)}",
        code="subset-without-images",
        fix="check the path",
    )
    return None
