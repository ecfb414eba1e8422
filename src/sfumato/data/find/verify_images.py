"""Which images decode completely: checked once per file and stored in the dataset index."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sfumato.data.find.findings import Findings
from sfumato.data.find.image_table import ImageRow, ImageTable, IntColumn
from sfumato.data.find.policy import Policy, report_bad_images, report_unsaved_index
from sfumato.data.images import decode_image
from sfumato.errors import Problems, UserError

log = logging.getLogger(__name__)
MOST_TRIED = 16  # images that are decoded before training where only headers are read
MIN_LOGGED = 1000  # images to decode, from which on a line is logged first

DecodeCallback = Callable[[int, int], None]  # images decoded, images in all


def find_decodable(images: ImageTable, where: str, policy: Policy, findings: Findings) -> IntColumn:
    """Rows of the images to keep: all of them, unless the policy asks for decoding; then those without damage.

    Headers do not show damage in the middle of a file. By default the step that needs the image reports it; with
    --on_bad_image skip the run must not stop there.
    """
    rows = np.arange(len(images))
    if not policy.decoding or not len(images):
        return rows
    origins = (where,) if "" in images.origins else images.origins
    index = policy.index("decoded", *origins)
    hashes = np.fromiter(map(hash_row, images), np.uint64, len(images))
    known = index.load()
    unknown = rows if known is None else np.flatnonzero(~np.isin(hashes, known["names"]))
    if not len(unknown):
        return rows
    if len(unknown) > MIN_LOGGED:
        log.info("%s: decoding %d images once, because bad images are skipped", where, len(unknown))
    faults = decode_all([images.get_row(row) for row in unknown.tolist()], workers=os.cpu_count() or 1)
    damaged = unknown[[fault is not None for fault in faults]]
    good = np.setdiff1d(rows, damaged)
    report_unsaved_index(index.save({"names": hashes[good]}), policy, findings)
    bad: list[tuple[str, UserError]] = []
    for row, fault in zip(unknown.tolist(), faults, strict=True):
        if fault is not None:
            bad.append((images.names.get_row(row), fault))
    report_bad_images(bad, where, policy, findings)
    return good


def refuse_undecodable(images: Sequence[ImageTable], problems: Problems) -> None:
    """Add a problem for each table whose first image is damaged where its header does not show it.

    Decoding all of them would take minutes; that of the first finds e.g. a download that was cut short everywhere. Of
    many tables only some are looked at, evenly chosen.
    """
    tables = [table for table in images if len(table)]
    chosen = tables[:: -(-len(tables) // MOST_TRIED) or 1]
    faults = decode_all([table.get_row(0) for table in chosen], workers=os.cpu_count() or 1)
    problems.found += [fault for fault in faults if fault is not None]


def hash_row(image: ImageRow) -> int:
    """64 bits that identify a file by path, size and time, and by its position in an archive."""
    identity = f"{image.path}\0{image.byte_count}\0{image.mtime_ns}\0{image.offset}"
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def decode_all(
    images: Sequence[ImageRow], *, workers: int, progress: DecodeCallback | None = None
) -> list[UserError | None]:
    """What is wrong with the pixels of each image, None where nothing is."""

    def check_image(image: ImageRow) -> UserError | None:
        try:
            decode_image(image.read(), image.path)
        except UserError as error:
            return error
        return None

    faults: list[UserError | None] = []
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-decode") as pool:
        for count, fault in enumerate(pool.map(check_image, images), 1):
            faults.append(fault)
            if progress is not None:
                progress(count, len(images))
    return faults
