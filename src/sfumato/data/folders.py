"""Reading a folder of pictures: names, sizes from headers, caption texts. Looks at files, never writes any."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

from sfumato.data.headers import BINARY, header_at
from sfumato.data.index import KnownCaption, KnownImage
from sfumato.errors import UserError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # in any case
ENDINGS = frozenset(IMAGE_ENDINGS)
SLOW_DISK = 0.001  # seconds for a file; above it, waiting for several files at once pays
TRIAL = 100  # files read one by one to tell

Known = TypeVar("Known", KnownImage, KnownCaption)


def list_folder(folder: str) -> Listing:
    """Sorted names; hidden files are passed over. OSError where the folder cannot be read."""
    images, others, folders = [], set[str](), []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if entry.is_dir():
                folders.append(name)
            elif name[name.rfind(".") :].lower() in ENDINGS:
                images.append(name)
            else:
                others.add(name)
    return Listing(folder=folder, images=sorted(images), others=others, folders=sorted(folders))


def read_images(folder: str, names: Sequence[str], known: Mapping[str, KnownImage]) -> Found[KnownImage]:
    """Sizes by name; faults of the images that cannot be trained on."""

    def read(descriptor: int, facts: os.stat_result, path: str) -> KnownImage:
        header = header_at(descriptor, path)
        return facts.st_size, facts.st_mtime_ns, header.width, header.height

    return read_files(folder, names, known, read)


def read_captions(folder: str, names: Sequence[str], known: Mapping[str, KnownCaption]) -> Found[KnownCaption]:
    """Texts by name of the caption file; faults of those that are not UTF-8."""

    def read(descriptor: int, facts: os.stat_result, path: str) -> KnownCaption:
        data = os.read(descriptor, facts.st_size + 1)
        try:
            return facts.st_size, facts.st_mtime_ns, data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise UserError(f"{path}, line {line}, is not UTF-8", fix="save it as UTF-8") from error

    return read_files(folder, names, known, read)


def read_files(
    folder: str, names: Sequence[str], known: Mapping[str, Known], read: Callable[[int, os.stat_result, str], Known]
) -> Found[Known]:
    """What is known of each file if it has not changed since, else what `read` says of the open file."""
    found: dict[str, Known] = {}
    faults: dict[str, UserError] = {}
    with reachable(folder) as (descriptor, prefix):

        def look(name: str) -> None:
            path = f"{folder}{os.sep}{name}"
            try:
                file = os.open(prefix + name, os.O_RDONLY | BINARY, dir_fd=descriptor)
                try:
                    found[name] = read(file, os.fstat(file), path)
                finally:
                    os.close(file)
            except UserError as error:
                faults[name] = error
            except OSError as error:
                faults[name] = UserError(f"{path} cannot be read ({error.strerror})", fix="check its permissions")

        unknown = list(names) if not known else []
        for name in names if known else ():
            old = known.get(name)
            try:  # in line, since it is done for every file at every start
                facts = os.stat(prefix + name, dir_fd=descriptor)
                same = old is not None and facts.st_mtime_ns == old[1] and facts.st_size == old[0]
            except OSError:
                same = False
            if old is not None and same:
                found[name] = old
            else:
                unknown.append(name)
        for_each(look, unknown)
    return Found(by_name=found, faults=faults, new=bool(unknown))


def for_each(look: Callable[[str], None], names: Sequence[str]) -> None:
    """One by one where the disk answers at once, which is faster than threads; on a slow disk several at a time."""
    times = []
    for name in names[:TRIAL]:
        start = time.perf_counter()
        look(name)
        times.append(time.perf_counter() - start)
    rest = names[TRIAL:]
    if rest and median(times) > SLOW_DISK:
        with ThreadPoolExecutor(16, thread_name_prefix="sfumato-headers") as pool:
            list(pool.map(look, rest))
    else:
        for name in rest:
            look(name)


@contextmanager
def reachable(folder: str) -> Iterator[tuple[int | None, str]]:
    """(descriptor, prefix) by which files are opened: relative to the open folder where the system can, for speed."""
    if os.open not in os.supports_dir_fd or os.stat not in os.supports_dir_fd:
        yield None, folder + os.sep
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor, ""
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class Found(Generic[Known]):
    """What was read, by file name, and what could not be."""

    by_name: dict[str, Known]
    faults: dict[str, UserError]
    new: bool  # whether any of it was not known before


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The names directly inside a folder."""

    folder: str
    images: list[str]
    others: set[str]
    folders: list[str]
