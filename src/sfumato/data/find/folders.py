"""Reading an image folder: names, sizes from headers, caption texts. Reads files, never writes any."""

from __future__ import annotations

import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np

from sfumato.common.files import open_descriptor
from sfumato.common.text_files import decode_text
from sfumato.data.captions import check_caption_size
from sfumato.data.find.headers import read_image_header
from sfumato.data.find.image_formats import EXTENSION_SET, IMAGE_EXTENSIONS, UNREAD_EXTENSIONS, find_lost_plugins
from sfumato.data.find.image_table import ImageTable, IntColumn, TextColumn, join_path
from sfumato.data.find.index import Columns, Index, pack_texts, unpack_texts
from sfumato.errors import UserError

HEADER_COLUMNS = ("widths", "heights", "traits")
SLOW_FILE_SECONDS = 0.001  # per file; on slower disks several files are read at once
TRIAL_FILES = 100  # read one by one to measure the disk

FileReader = Callable[[int, os.stat_result, int], None]  # open file, its stat, its index in the list of names


def list_folder(folder: str) -> Listing:
    """Sorted names, without hidden files. OSError where the folder cannot be read."""
    images, others, folders, unread = [], dict[str, str](), [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            extension = name[name.rfind(".") :].lower()
            if extension in EXTENSION_SET and not entry.is_dir():
                images.append(name)
            elif entry.is_dir():
                folders.append(name)
            elif extension in UNREAD_EXTENSIONS:
                unread.append(name)
            else:
                others[name] = name
    images.sort()
    return Listing(folder=folder, images=images, others=others, folders=sorted(folders), unread=unread)


def list_recursively(folder: str) -> Listing:
    """Everything in the subfolders, as paths with / from here; a folder that links lead to again counts once."""
    images, others, unread = [], dict[str, str](), []
    seen = {os.path.realpath(folder)}
    queue = [f"{name}/" for name in list_folder(folder).folders]
    while queue:
        prefix = queue.pop()
        path = os.path.realpath(os.path.join(folder, prefix))  # noqa: PTH118 -- strings, as everywhere here
        if path in seen:
            continue
        seen.add(path)
        try:
            listing = list_folder(path)
        except OSError:
            continue
        images += [prefix + name for name in listing.images]
        others |= {prefix + name: prefix + name for name in listing.others}
        unread += [prefix + name for name in listing.unread]
        queue += [f"{prefix}{name}/" for name in listing.folders]
    return Listing(folder=folder, images=sorted(images), others=others, folders=[], unread=unread)


def read_images(folder: str, names: list[str], index: Index) -> ImageHeaders:
    """Sizes in columns, from the index where a file has not changed; 0 where an image cannot be used."""
    known = index.load()
    rows, columns, texts = match_index(folder, names, known, HEADER_COLUMNS)
    rows[find_lost_plugins(columns["traits"])] = -1
    changed = range(len(names)) if known is None else np.flatnonzero(rows < 0).tolist()
    fresh = {name: array("q", bytes(8 * len(changed))) for name in ("byte_counts", "mtimes", *HEADER_COLUMNS)}
    byte_counts, mtimes, widths, heights, traits = fresh.values()

    def read(descriptor: int, stat: os.stat_result, position: int) -> None:
        path = join_path(folder, names[changed[position]])
        header = read_image_header(descriptor, path, stat.st_size)
        byte_counts[position], mtimes[position] = stat.st_size, stat.st_mtime_ns
        widths[position], heights[position], traits[position] = header.width, header.height, header.traits

    faults = read_files(folder, [names[row] for row in changed], read)
    for name, values in fresh.items():
        columns[name][changed] = values
    saved = True
    if changed or (known is not None and len(known["mtimes"]) != len(names)):
        saved = index.save({**pack_texts("names", texts), **columns})
    by_row = {changed[position]: fault for position, fault in faults.items()}
    return ImageHeaders(names=texts, columns=columns, faults=by_row, saved=saved)


def read_captions(folder: str, names: list[str], index: Index) -> CaptionFiles:
    """Texts, from the index where a file has not changed; empty where a file cannot be decoded."""
    known = index.load()
    rows, columns, names_now = match_index(folder, names, known, ())
    before = TextColumn.encode(()) if known is None else unpack_texts("texts", known)
    changed = range(len(names)) if known is None else np.flatnonzero(rows < 0).tolist()
    if not changed and len(before) == len(names) and np.array_equal(rows, np.arange(len(rows))):
        return CaptionFiles(texts=before, faults={}, saved=True)
    fresh: list[str] = [""] * len(changed)
    byte_counts, mtimes = (array("q", bytes(8 * len(changed))) for _ in range(2))

    def read(descriptor: int, stat: os.stat_result, position: int) -> None:
        path = join_path(folder, names[changed[position]])
        check_caption_size(stat.st_size, path)
        fresh[position] = decode_text(os.read(descriptor, stat.st_size + 1), path)
        byte_counts[position], mtimes[position] = stat.st_size, stat.st_mtime_ns

    faults = read_files(folder, [names[row] for row in changed], read)
    columns["byte_counts"][changed], columns["mtimes"][changed] = byte_counts, mtimes
    fresh_texts = iter(fresh)
    texts = TextColumn.encode(next(fresh_texts) if row < 0 else before.get_row(row) for row in rows.tolist())
    saved = index.save({**pack_texts("names", names_now), **pack_texts("texts", texts), **columns})
    by_row = {changed[position]: fault for position, fault in faults.items()}
    return CaptionFiles(texts=texts, faults=by_row, saved=saved)


def match_index(
    folder: str, names: Sequence[str], known: Columns | None, more: Sequence[str]
) -> tuple[IntColumn, Columns, TextColumn]:
    """(each name's row in the index, -1 where the file is new or has changed; the columns; the names).

    more: the columns to take from the index besides size and time.
    """
    texts = TextColumn.encode(names)
    keys = ("byte_counts", "mtimes", *more)
    if known is None:
        return np.full(len(names), -1), {key: np.zeros(len(names), np.int64) for key in keys}, texts
    byte_counts, mtimes = stat_files(folder, names)
    rows = find_name_rows(texts, unpack_texts("names", known))
    unchanged = rows >= 0
    same_size = known["byte_counts"][rows[unchanged]] == byte_counts[unchanged]
    same_time = known["mtimes"][rows[unchanged]] == mtimes[unchanged]
    unchanged[unchanged] = same_size & same_time
    rows[~unchanged] = -1
    columns: Columns = {"byte_counts": byte_counts, "mtimes": mtimes}
    for key in more:
        columns[key] = np.zeros(len(names), np.int64)
        columns[key][unchanged] = known[key][rows[unchanged]]
    return rows, columns, texts


def find_name_rows(names: TextColumn, known: TextColumn) -> IntColumn:
    """The row of each name among the known ones, -1 for none."""
    if names.same_as(known):
        return np.arange(len(names))
    known_rows = {name: row for row, name in enumerate(known)}
    return np.fromiter((known_rows.get(name, -1) for name in names), np.int64, len(names))


def stat_files(folder: str, names: Sequence[str]) -> tuple[IntColumn, IntColumn]:
    """Size in bytes and modification time in nanoseconds of each file, -1 where there is none.

    One plain loop without calls, because it runs over all files at every start.
    """
    byte_counts, mtimes = array("q"), array("q")
    stat = os.stat
    with open_folder(folder) as (descriptor, prefix):
        for name in names:
            try:
                result = stat(prefix + name, dir_fd=descriptor)
            except OSError:
                byte_counts.append(-1)
                mtimes.append(-1)
            else:
                byte_counts.append(result.st_size)
                mtimes.append(result.st_mtime_ns)
    return np.array(byte_counts, np.int64), np.array(mtimes, np.int64)


def read_files(folder: str, names: Sequence[str], read: FileReader) -> dict[int, UserError]:
    """Call `read` with each open file; returns the faults by index."""
    faults: dict[int, UserError] = {}
    with open_folder(folder) as (descriptor, prefix):

        def read_file(index: int) -> None:
            try:
                where = join_path(folder, names[index])
                file, status = open_descriptor(prefix + names[index], folder=descriptor, where=where)
                try:
                    read(file, status, index)
                finally:
                    os.close(file)
            except UserError as error:
                faults[index] = error
            except OSError as error:
                faults[index] = UserError(
                    f"{join_path(folder, names[index])} cannot be read ({error.strerror})",
                    code="data-file-unreadable",
                    fix="check that the file exists and may be read",
                )

        call_for_each(read_file, len(names))
    return dict(sorted(faults.items()))


def call_for_each(function: Callable[[int], None], count: int) -> None:
    """Call it for 0, 1, ...: one by one on a fast disk, where threads would cost time; in threads on a slow one."""
    seconds: list[float] = []
    for index in range(min(count, TRIAL_FILES)):
        start = time.perf_counter()
        function(index)
        seconds.append(time.perf_counter() - start)
    rest = range(TRIAL_FILES, count)

    def call_for_part(part: range) -> None:
        for index in part:
            function(index)

    if rest and median(seconds) > SLOW_FILE_SECONDS:
        parts = [rest[start : start + TRIAL_FILES] for start in range(0, len(rest), TRIAL_FILES)]
        with ThreadPoolExecutor(16, thread_name_prefix="sfumato-headers") as pool:
            for _ in pool.map(call_for_part, parts):
                pass  # raises what a thread raised
    else:
        call_for_part(rest)


@contextmanager
def open_folder(folder: str) -> Iterator[tuple[int | None, str]]:
    """(descriptor, prefix) for opening files: relative to the open folder where the system can, which is faster."""
    if not folder or os.open not in os.supports_dir_fd or os.stat not in os.supports_dir_fd:
        yield None, join_path(folder, "")
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor, ""
    finally:
        os.close(descriptor)


def describe_listing(listing: Listing) -> str:
    """What a folder without images holds, for a message."""
    names = (*listing.others, *listing.unread)
    extensions = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in names)  # noqa: PTH122
    if extensions:
        counts = ", ".join(f"{count} {extension}" for extension, count in extensions.most_common(5))
        return f"it holds {counts}, and images end in {' '.join(IMAGE_EXTENSIONS)}"
    return "it is empty" if not listing.folders else f"it holds only folders without images: {listing.folders[:5]}"


@dataclass(frozen=True, kw_only=True)
class ImageHeaders:
    """What the headers of a folder's images contain."""

    names: TextColumn
    columns: Columns  # byte_counts, mtimes, widths, heights, traits
    faults: dict[int, UserError]  # by row
    saved: bool  # whether the index could be written

    @property
    def valid_rows(self) -> IntColumn:
        return np.flatnonzero(self.columns["widths"] > 0)

    def make_table(self, origin: str, rows: IntColumn) -> ImageTable:
        """The images at these rows, without captions."""
        names, columns = self.names, self.columns
        if not np.array_equal(rows, np.arange(len(names))):
            names = TextColumn.encode(names.get_row(row) for row in rows.tolist())
            columns = {key: column[rows] for key, column in columns.items()}
        return ImageTable(
            origins=(origin,),
            names=names,
            byte_counts=columns["byte_counts"],
            mtimes=columns["mtimes"],
            widths=columns["widths"],
            heights=columns["heights"],
            traits=columns["traits"],
            captions=TextColumn.repeat("", len(rows)),
        )


@dataclass(frozen=True, kw_only=True)
class CaptionFiles:
    """The contents of a folder's caption files."""

    texts: TextColumn
    faults: dict[int, UserError]  # by row
    saved: bool  # whether the index could be written


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The names directly inside a folder, or everything in its subfolders."""

    folder: str
    images: list[str]
    others: dict[str, str]  # name -> the same name
    folders: list[str]
    unread: list[str]  # images and videos of kinds that are not read
