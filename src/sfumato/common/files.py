"""Writing files whole or not at all, and reading nothing but files."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple

from sfumato.common.locks import is_abandoned, lock_file
from sfumato.common.text import format_bytes
from sfumato.errors import UserError

BINARY = os.O_BINARY if os.name == "nt" else 0  # for os.open
DONT_WAIT = 0 if os.name == "nt" else os.O_NONBLOCK  # os.open must not wait for the other end of a named pipe
READ_FLAGS = os.O_RDONLY | BINARY | DONT_WAIT
SPECIAL_FILES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
MAX_FILE_BYTES = 4 << 30  # of what is read at once; more is no text, caption or image


def open_descriptor(path: Path | str, *, folder: int | None = None, where: str = "") -> tuple[int, os.stat_result]:
    """A descriptor for reading a plain file, and the file's status: the one door to files that users name.

    folder: descriptor of the folder to which the path is relative. where: for messages; the path by default. OSError
    where it cannot be opened or is a folder; UserError for a named pipe, a socket or a device. It is opened first and
    looked at then, so that nothing else can take its place in between.
    """
    _check_name(path)
    try:
        descriptor = os.open(path, READ_FLAGS, dir_fd=folder)
    except OSError:
        refuse_special_file(Path(where or path))  # sockets cannot be opened at all
        raise
    try:
        status = os.fstat(descriptor)
        refuse_special_mode(status.st_mode, where or str(path))
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    except (OSError, UserError):
        os.close(descriptor)
        raise
    return descriptor, status


def open_unbuffered(path: Path | str) -> FileIO:
    """A plain file for reading, without a buffer. Errors as of `open_descriptor`."""
    _check_name(path)
    return FileIO(path, "rb", opener=lambda name, _: open_descriptor(name)[0])


def _check_name(path: Path | str) -> None:
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "the name has a NUL letter", str(path))


def open_file(path: Path | str) -> BufferedReader:
    """A plain file for reading bytes. Errors as of `open_descriptor`."""
    return BufferedReader(open_unbuffered(path))


def read_file(path: Path | str) -> bytes:
    """The bytes of a plain file. OSError where it cannot be read.

    UserError for a special file, for one whose size the system does not know (in /proc), which might never end, and
    for one that is too large to be read at once.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"{path} has {size / 1e9:.1f} GB, too much for such a file", code="file-too-large")
        data = file.read(size)
        if size == 0 and file.read(1):
            raise UserError(
                f"{path} is made by the system, not a plain file", code="file-without-size", fix="give a plain file"
            )
    return data


def refuse_special_file(path: Path, *, where: str = "") -> None:
    """UserError for a named pipe, a socket or a device; nothing for a file, a folder or what is missing.

    where: for messages; the path by default.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: NUL letters
        return
    refuse_special_mode(mode, where or str(path))


def refuse_special_mode(mode: int, where: str) -> None:
    """The same for the mode of a file that is open. where: the file, for messages."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    what = next((words for is_kind, words in SPECIAL_FILES if is_kind(mode)), "of a special kind")
    raise UserError(f"{where} is {what}, not a plain file", code="file-is-special", fix="give a plain file")


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it to disk and rename it, on any failure remove it.

    The block writes and verifies the temporary file; nothing ever sees a half-written `path`. What a kill has left of
    an earlier write goes first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with mark_in_use(temporary):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def mark_in_use(temporary: Path) -> Iterator[None]:
    """Create the file and lock it, so that others see that its process lives; not on Windows, where it could then not
    be renamed.
    """
    if os.name == "nt":
        yield
        return
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock_file(descriptor, exclusive=True, wait=False)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, targets: str) -> None:
    """Remove the temporary files that killed processes left. targets: pattern of the names they were to have."""
    pattern = re.compile(rf"\.{targets}\.[0-9a-f]{{8}}\.tmp")
    try:
        with os.scandir(folder) as entries:
            found = [folder / entry.name for entry in entries if pattern.fullmatch(entry.name)]
    except OSError:
        return
    for path in found:
        if path.is_file() and is_abandoned(path):
            with suppress(OSError):  # somebody else removed it, or it is not ours
                path.unlink()


@contextmanager
def write_folder_atomically(folder: Path) -> Iterator[Path]:
    """The same for a folder: the block fills a temporary one; an older one is removed when the new one is complete.

    A kill in the middle leaves the old or the new version, complete, in its place or beside it (`list_folder_copies`).
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if folder.exists():
            folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old"))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(folder.parent)
    for leftover in list_folder_copies(folder):  # of this save and of earlier ones that were killed
        shutil.rmtree(leftover, ignore_errors=True)


def list_folder_copies(folder: Path) -> list[Path]:
    """The new and the old version that a kill in the middle of `atomic_folder` leaves beside it."""
    beside = sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []
    return [path for path in beside if path.name.startswith(f".{folder.name}.") and path.suffix in (".tmp", ".old")]


def sync(path: Path) -> None:
    """Make a file's or folder's contents durable; folders cannot be opened for it on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """As UTF-8; the bytes of file names that are not UTF-8 are written as \\udc.., as in JSON."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_quickly(path: Path, content: bytes) -> None:
    """Whole or not at all, but not synced to disk: for many small files. A link stays one, and so do permissions."""
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing where there is nothing."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class DiskNeed(NamedTuple):
    """Files of one kind."""

    what: str  # in the plural
    number: int
    size: int  # bytes of each


def check_disk_space(folder: Path, needs: Sequence[DiskNeed], *, mine: str, fix: str) -> None:
    """Raise UserError where the disk lacks room; files in the folder that start with `mine` are replaced, and so is
    what a kill has left of them. fix: what to do then.
    """
    needed = sum(need.number * need.size for need in needs)
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    replaced = 0
    own = [*folder.glob(f"{glob.escape(mine)}*"), *folder.glob(f".{glob.escape(mine)}*.tmp")]
    for path in [*own, *folder.glob(f".{glob.escape(mine)}*.old")]:
        replaced += sum(file.stat().st_size for file in (path, *path.rglob("*")))
    free = shutil.disk_usage(place).free
    if needed > free + replaced:
        what = " and ".join(f"{need.number} {need.what} of {format_bytes(need.size)}" for need in needs if need.number)
        raise UserError(
            f"the disk of {folder} has {format_bytes(free)} free, and {format_bytes(needed)} are needed: {what}",
            code="disk-too-small",
            fix=fix,
        )


def check_file_writable(path: Path, *, option: str) -> None:
    """The same as `check_writable` for a file that will be made or replaced."""
    if path.is_dir():
        raise UserError(
            f"{option}: {path} is a folder, not a file", code="output-file-is-folder", fix="give a file name"
        )
    check_writable(path.parent, option=option)


def check_writable(folder: Path, *, option: str = "") -> None:
    """Try a file in the folder, or where the folder is to be made, and take it away again: nothing is left behind.

    option: that named the folder, for the message.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = place / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{option}{': ' if option else ''}cannot write into {folder} ({error.strerror})",
            code="folder-not-writable",
            fix=f"give a writable folder with {option}" if option else "name a place that can be written to",
        ) from error
