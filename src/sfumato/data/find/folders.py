"""Reading a folder of pictures: names, sizes from headers, caption texts. Looks at files, never writes any."""

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

from sfumato.data.find.headers import BINARY, header_at
from sfumato.data.find.image_table import Column, Pictures, Texts, path_of
from sfumato.data.find.index import Columns, Index, packed, unpacked
from sfumato.errors import UserError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")  # in any case
ENDINGS = frozenset(IMAGE_ENDINGS)
SLOW_DISK = 0.001  # seconds for a file; above it, waiting for several files at once pays
TRIAL = 100  # files read one by one to tell

Read = Callable[[int, os.stat_result, int], None]  # open file, its facts, its place in the list of names


def is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in ENDINGS


def list_folder(folder: str) -> Listing:
    """Sorted names; hidden files are passed over. OSError where the folder cannot be read."""
    images, others, folders = [], dict[str, str](), []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if name[name.rfind(".") :].lower() in ENDINGS and not entry.is_dir():
                images.append(name)
            elif entry.is_dir():
                folders.append(name)
            else:
                others[name] = name
    images.sort()
    return Listing(folder=folder, images=images, others=others, folders=sorted(folders))


def list_below(folder: str) -> Listing:
    """Everything in the folders below, as paths with / from here; a folder that is met again by a link counts once."""
    images, others = [], dict[str, str]()
    seen = {os.path.realpath(folder)}
    waiting = [f"{name}/" for name in list_folder(folder).folders]
    while waiting:
        prefix = waiting.pop()
        place = os.path.realpath(os.path.join(folder, prefix))  # noqa: PTH118 -- strings, as everywhere here
        if place in seen:
            continue
        seen.add(place)
        try:
            found = list_folder(place)
        except OSError:
            continue
        images += [prefix + name for name in found.images]
        others |= {prefix + name: prefix + name for name in found.others}
        waiting += [f"{prefix}{name}/" for name in found.folders]
    return Listing(folder=folder, images=sorted(images), others=others, folders=[])


def read_images(folder: str, names: list[str], index: Index) -> Images:
    """Sizes in columns, those of the last time where a file has not changed; 0 where an image cannot be used."""
    known = index.load()
    rows, columns, texts = remembered(folder, names, known, ("widths", "heights"))
    changed = range(len(names)) if known is None else np.flatnonzero(rows < 0).tolist()
    fresh = {name: array("q", bytes(8 * len(changed))) for name in ("byte_counts", "mtimes", "widths", "heights")}
    byte_counts, mtimes, widths, heights = fresh.values()

    def read(descriptor: int, facts: os.stat_result, place: int) -> None:
        path = path_of(folder, names[changed[place]])
        header = header_at(descriptor, path, facts.st_size)
        byte_counts[place], mtimes[place] = facts.st_size, facts.st_mtime_ns
        widths[place], heights[place] = header.width, header.height

    faults = read_files(folder, [names[place] for place in changed], read)
    for name, values in fresh.items():
        columns[name][changed] = values
    saved = True
    if changed or (known is not None and len(known["mtimes"]) != len(names)):
        saved = index.save({**packed("names", texts), **columns})
    by_place = {changed[place]: fault for place, fault in faults.items()}
    return Images(names=texts, columns=columns, faults=by_place, saved=saved)


def read_captions(folder: str, names: list[str], index: Index) -> Captions:
    """Texts, those of the last time where a file has not changed; empty where a file is not UTF-8."""
    known = index.load()
    rows, columns, names_now = remembered(folder, names, known, ())
    before = Texts.of(()) if known is None else unpacked("texts", known)
    changed = range(len(names)) if known is None else np.flatnonzero(rows < 0).tolist()
    if not changed and len(before) == len(names) and np.array_equal(rows, np.arange(len(rows))):
        return Captions(texts=before, faults={}, saved=True)
    fresh: list[str] = [""] * len(changed)
    byte_counts, mtimes = (array("q", bytes(8 * len(changed))) for _ in range(2))

    def read(descriptor: int, facts: os.stat_result, place: int) -> None:
        path = path_of(folder, names[changed[place]])
        fresh[place] = decoded(os.read(descriptor, facts.st_size + 1), path)
        byte_counts[place], mtimes[place] = facts.st_size, facts.st_mtime_ns

    faults = read_files(folder, [names[place] for place in changed], read)
    columns["byte_counts"][changed], columns["mtimes"][changed] = byte_counts, mtimes
    waiting = iter(fresh)
    texts = Texts.of(next(waiting) if row < 0 else before.row(row) for row in rows.tolist())
    saved = index.save({**packed("names", names_now), **packed("texts", texts), **columns})
    return Captions(texts=texts, faults={changed[place]: fault for place, fault in faults.items()}, saved=saved)


def decoded(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}, is not UTF-8", fix="save it as UTF-8") from error


def remembered(
    folder: str, names: Sequence[str], known: Columns | None, more: Sequence[str]
) -> tuple[Column, Columns, Texts]:
    """For each name its row in what is known, -1 where the file has changed or is new; the columns; the names."""
    texts = Texts.of(names)
    kinds = ("byte_counts", "mtimes", *more)
    if known is None:
        return np.full(len(names), -1), {kind: np.zeros(len(names), np.int64) for kind in kinds}, texts
    byte_counts, mtimes = stats(folder, names)
    rows = rows_of(texts, unpacked("names", known))
    there = rows >= 0
    there[there] = (known["byte_counts"][rows[there]] == byte_counts[there]) & (
        known["mtimes"][rows[there]] == mtimes[there]
    )
    rows[~there] = -1
    columns: Columns = {"byte_counts": byte_counts, "mtimes": mtimes}
    for kind in more:
        columns[kind] = np.zeros(len(names), np.int64)
        columns[kind][there] = known[kind][rows[there]]
    return rows, columns, texts


def rows_of(names: Texts, known: Texts) -> Column:
    if names.same_as(known):
        return np.arange(len(names))
    places = {name: place for place, name in enumerate(known)}
    return np.fromiter((places.get(name, -1) for name in names), np.int64, len(names))


def stats(folder: str, names: Sequence[str]) -> tuple[Column, Column]:
    """Size and modification time of each file, -1 where there is none; in line, since it is done at every start."""
    byte_counts, mtimes = array("q"), array("q")
    stat = os.stat
    with reachable(folder) as (descriptor, prefix):
        for name in names:
            try:
                facts = stat(prefix + name, dir_fd=descriptor)
            except OSError:
                byte_counts.append(-1)
                mtimes.append(-1)
            else:
                byte_counts.append(facts.st_size)
                mtimes.append(facts.st_mtime_ns)
    return np.array(byte_counts, np.int64), np.array(mtimes, np.int64)


def read_files(folder: str, names: Sequence[str], read: Read) -> dict[int, UserError]:
    """Let `read` look at each open file; what it says of those that are bad, by place."""
    faults: dict[int, UserError] = {}
    with reachable(folder) as (descriptor, prefix):

        def look(place: int) -> None:
            try:
                file = os.open(prefix + names[place], os.O_RDONLY | BINARY, dir_fd=descriptor)
                try:
                    read(file, os.fstat(file), place)
                finally:
                    os.close(file)
            except UserError as error:
                faults[place] = error
            except OSError as error:
                path = path_of(folder, names[place])
                faults[place] = UserError(
                    f"{path} cannot be read ({error.strerror})", fix="check that it is there and may be read"
                )

        for_each(look, len(names))
    return dict(sorted(faults.items()))


def for_each(look: Callable[[int], None], count: int) -> None:
    """One by one where the disk answers at once, which is faster than threads; on a slow disk several at a time."""
    times = []
    for place in range(min(count, TRIAL)):
        start = time.perf_counter()
        look(place)
        times.append(time.perf_counter() - start)
    rest = range(TRIAL, count)
    if rest and median(times) > SLOW_DISK:
        parts = [rest[start : start + TRIAL] for start in range(0, len(rest), TRIAL)]
        with ThreadPoolExecutor(16, thread_name_prefix="sfumato-headers") as pool:
            for _ in pool.map(lambda part: [look(place) for place in part], parts):
                pass
    else:
        for place in rest:
            look(place)


@contextmanager
def reachable(folder: str) -> Iterator[tuple[int | None, str]]:
    """(descriptor, prefix) by which files are opened: relative to the open folder where the system can, for speed."""
    if not folder or os.open not in os.supports_dir_fd or os.stat not in os.supports_dir_fd:
        yield None, path_of(folder, "")
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor, ""
    finally:
        os.close(descriptor)


def what_is_there(listing: Listing) -> str:
    """For the message about a folder without images: what nearly matched."""
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in listing.others)  # noqa: PTH122
    if endings:
        kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
        return f"it holds {kinds}, and images end in {' '.join(IMAGE_ENDINGS)}"
    return "it is empty" if not listing.folders else f"it holds only folders without images: {listing.folders[:5]}"


@dataclass(frozen=True, kw_only=True)
class Images:
    """What the headers say."""

    names: Texts
    columns: Columns  # byte_counts, mtimes, widths, heights
    faults: dict[int, UserError]  # by place
    saved: bool  # whether it is remembered

    @property
    def usable(self) -> Column:
        """Places of the good ones."""
        return np.flatnonzero(self.columns["widths"] > 0)

    def pictures(self, origin: str, places: Column) -> Pictures:
        """Those at these places, still without captions."""
        all_of_them = np.array_equal(places, np.arange(len(self.names)))
        names = self.names if all_of_them else Texts.of(self.names.row(place) for place in places.tolist())
        columns = self.columns if all_of_them else {name: column[places] for name, column in self.columns.items()}
        return Pictures(
            origins=(origin,),
            names=names,
            byte_counts=columns["byte_counts"],
            mtimes=columns["mtimes"],
            widths=columns["widths"],
            heights=columns["heights"],
            captions=Texts.repeated("", len(places)),
        )


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What the caption files hold."""

    texts: Texts
    faults: dict[int, UserError]  # by place
    saved: bool


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The names directly inside a folder, or all below it."""

    folder: str
    images: list[str]
    others: dict[str, str]  # each by itself
    folders: list[str]
