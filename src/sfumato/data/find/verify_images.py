"""Which images decode completely, and how transparent they are: checked once per file, stored in the dataset index."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfumato.data.find.findings import Findings
from sfumato.data.find.image_table import ImageRow, ImageTable, IntColumn
from sfumato.data.find.index import Columns, Index
from sfumato.data.find.policy import Policy, report_bad_images, report_unsaved_index
from sfumato.data.find.traits import ALPHA
from sfumato.data.images import decode_layers
from sfumato.errors import Problems, UserError

log = logging.getLogger(__name__)
MOST_TRIED = 16  # images that are decoded before training where only headers are read
MIN_LOGGED = 1000  # images to decode, from which on a line is logged first
OPAQUE = 255

DecodeCallback = Callable[[int, int], None]  # images decoded, images in all


def find_decodable(images: ImageTable, where: str, policy: Policy, findings: Findings) -> IntColumn:
    """Rows of the images to keep: all of them, unless the policy asks for decoding; then those without damage.

    Headers do not show damage in the middle of a file. By default the step that needs the image reports it; with
    --on_bad_image skip the run must not stop there.
    """
    rows = np.arange(len(images))
    if not policy.decoding or not len(images):
        return rows
    check = check_pixels(images, policy.index("decoded", *list_origins(images, where)), workers=os.cpu_count() or 1)
    report_unsaved_index(check.saved, policy, findings)
    bad = [(images.names.get_row(row), fault) for row, fault in check.faults.items()]
    report_bad_images(bad, where, policy, findings)
    return np.setdiff1d(rows, list(check.faults))


def list_origins(images: ImageTable, where: str) -> tuple[str, ...]:
    """What the index of decoded images is named by: folders or archives, or the subset where there are several."""
    return (where,) if "" in images.origins else tuple(images.origins)


def check_pixels(
    images: ImageTable, index: Index, *, workers: int, progress: DecodeCallback | None = None
) -> PixelCheck:
    """Decode every image that was not found whole before, while it had the same size and time."""
    hashes = np.fromiter(map(hash_row, images), np.uint64, len(images))
    known = index.load() or {"names": hashes[:0], "lowest_alpha": np.zeros(0, np.uint8)}
    unknown = np.flatnonzero(~np.isin(hashes, known["names"]))
    if len(unknown) > MIN_LOGGED and progress is None:
        log.info("decoding %d images once, because bad images are skipped", len(unknown))
    results = decode_all([images.get_row(row) for row in unknown.tolist()], workers=workers, progress=progress)
    whole = [(row, alpha) for row, alpha in zip(unknown.tolist(), results, strict=True) if isinstance(alpha, int)]
    saved = True
    if whole:
        rows, alphas = (list(column) for column in zip(*whole, strict=True))
        known = add_known(known, hashes[rows], np.array(alphas, np.uint8))
        saved = index.save(known)
    faults = {row: fault for row, fault in zip(unknown.tolist(), results, strict=True) if isinstance(fault, UserError)}
    return PixelCheck(faults=faults, lowest_alpha=find_lowest_alpha(known, hashes), saved=saved)


def add_known(known: Columns, hashes: NDArray[np.uint64], lowest_alpha: NDArray[np.uint8]) -> Columns:
    """The index with more images, ascending by hash."""
    names, first = np.unique(np.concatenate([known["names"], hashes]), return_index=True)
    return {"names": names, "lowest_alpha": np.concatenate([known["lowest_alpha"], lowest_alpha])[first]}


def find_lowest_alpha(known: Columns, hashes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Of each image its lowest alpha from the index; opaque where it is not there."""
    lowest = np.full(len(hashes), OPAQUE, np.uint8)
    if len(known["names"]):
        place = np.minimum(np.searchsorted(known["names"], hashes), len(known["names"]) - 1)
        found = known["names"][place] == hashes
        lowest[found] = known["lowest_alpha"][place[found]]
    return lowest


def refuse_undecodable(images: Sequence[ImageTable], problems: Problems) -> None:
    """Add a problem for each table whose first image is damaged where its header does not show it.

    Decoding all of them would take minutes; that of the first finds e.g. a download that was cut short everywhere. Of
    many tables only some are looked at, evenly chosen.
    """
    tables = [table for table in images if len(table)]
    chosen = tables[:: -(-len(tables) // MOST_TRIED) or 1]
    faults = decode_all([table.get_row(0) for table in chosen], workers=os.cpu_count() or 1)
    problems.found += [fault for fault in faults if isinstance(fault, UserError)]


def hash_row(image: ImageRow) -> int:
    """64 bits that identify a file by path, size and time, and by its position in an archive."""
    identity = f"{image.path}\0{image.byte_count}\0{image.mtime_ns}\0{image.offset}"
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def decode_all(
    images: Sequence[ImageRow], *, workers: int, progress: DecodeCallback | None = None
) -> list[UserError | int]:
    """The lowest alpha of each image (255: opaque), or what is wrong with its pixels."""

    def decode(image: ImageRow) -> UserError | int:
        try:
            _, alpha = decode_layers(image.read(), image.path, alpha=bool(image.traits & ALPHA))
        except UserError as error:
            return error
        return OPAQUE if alpha is None else int(np.asarray(alpha).min())

    results: list[UserError | int] = []
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-decode") as pool:
        for count, result in enumerate(pool.map(decode, images), 1):
            results.append(result)
            if progress is not None:
                progress(count, len(images))
    return results


@dataclass(frozen=True, kw_only=True)
class PixelCheck:
    """What decoding the images of a table showed, now or earlier."""

    faults: dict[int, UserError]  # by row
    lowest_alpha: NDArray[np.uint8]  # of each image; 255 where it is opaque, or damaged
    saved: bool  # whether the index could be written
