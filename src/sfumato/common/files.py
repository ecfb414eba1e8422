"""Writing files whole or not at all, and reading nothing but files."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sfumato.errors import UserError

DONT_WAIT = 0 if os.name == "nt" else os.O_NONBLOCK  # os.open must not wait for the other end of a named pipe
SPECIAL_FILES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_file(path: Path) -> bytes:
    """The bytes of a file. OSError where it cannot be read; UserError for a named pipe, which might never end."""
    with open_plain_file(str(path)) as file:
        return file.read()


def open_plain_file(path: str) -> BinaryIO:
    """A file for reading, without waiting for the other end of a named pipe.

    OSError where it cannot be read; UserError for a named pipe, a socket or a device.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | DONT_WAIT))  # noqa: SIM115
    except OSError:
        refuse_special_file(Path(path))  # a socket cannot be opened at all
        raise
    try:
        refuse_special_mode(os.fstat(file.fileno()).st_mode, path)
    except UserError:
        file.close()
        raise
    return file


def refuse_special_file(path: Path, *, where: str = "") -> None:
    """UserError for a named pipe, a socket or a device; nothing for a file, a folder or what is missing.

    where: for messages; the path by default.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
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

    The block writes and verifies the temporary file; nothing ever sees a half-written `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


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


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing where there is nothing."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_disk_space(folder: Path, needed: int, *, mine: str, what: str) -> None:
    """Raise UserError where the disk lacks `needed` bytes; files in the folder that start with `mine` are replaced."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    replaced = 0
    for path in folder.glob(f"{glob.escape(mine)}*"):
        replaced += sum(file.stat().st_size for file in (path, *path.rglob("*")))
    free = shutil.disk_usage(place).free
    if needed > free + replaced:
        raise UserError(
            f"{what} need {needed / 1e9:.1f} GB on the disk of {folder}, which has {free / 1e9:.1f} GB free",
            code="disk-too-small",
            fix="save less often, keep fewer (--save_last_n_steps, --save_last_n_epochs), or --save_precision fp16",
        )


def check_writable(folder: Path, *, option: str) -> None:
    """Try a file in the folder, or where the folder is to be made, and take it away again: nothing is left behind."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = place / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{option}: cannot write into {folder} ({error.strerror})",
            code="folder-not-writable",
            fix=f"give a writable folder with {option}",
        ) from error
