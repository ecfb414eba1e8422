"""The caption files of an editor: their content as last read, and writing that never hides a change by others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.common.files import read_file, write_quickly
from sfumato.common.text_files import decode_text
from sfumato.data.captions import MAX_CAPTION_BYTES, check_caption_size
from sfumato.errors import UserError

Stamp = tuple[int, int, int] | None  # size, mtime_ns and number of a file; None for none


class ChangedOnDiskError(Exception):
    """A caption file has another content than the one that was last read."""


@dataclass(frozen=True, kw_only=True)
class CaptionContent:
    """A caption file as it is on disk."""

    data: bytes | None  # None: there is no file, or it cannot be read
    text: str = ""  # as it is shown: without line breaks at its ends, with \n between lines
    problem: str = ""  # why training would not read it


MISSING = CaptionContent(data=None)


class CaptionStore:
    """Caption files by their number. Nothing but these paths is ever read or written."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.contents = [MISSING] * len(self.paths)
        self.stamps: list[Stamp] = [None] * len(self.paths)
        self.refresh()

    def refresh(self) -> list[int]:
        """Read again what has changed on disk; gives the numbers of the files with another content."""
        changed: list[int] = []
        for number, path in enumerate(self.paths):
            if get_stamp(path) != self.stamps[number] and self.reread(number):
                changed.append(number)
        return changed

    def reread(self, number: int) -> bool:
        """Read one file again; whether its content is another one."""
        path, before = self.paths[number], self.contents[number]
        self.stamps[number] = get_stamp(path)  # first: a change in between is seen the next time
        self.contents[number] = read_caption_content(path)
        return self.contents[number] != before

    def write(self, number: int, data: bytes | None) -> None:
        """Replace the content that was last read; None removes the file.

        ChangedOnDiskError where the file is another one meanwhile, which then has been read again and is kept. OSError
        where it cannot be written, UserError where there is something that cannot be read.
        """
        if self.reread(number):
            raise ChangedOnDiskError
        path, before = self.paths[number], self.contents[number]
        if before.data is None and before.problem:
            raise UserError(before.problem, code="editor-caption-hidden", fix="move it away, and try again")
        if data is None:
            path.unlink(missing_ok=True)
        else:
            write_quickly(path, data)
        self.reread(number)


def get_stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def read_caption_content(path: Path) -> CaptionContent:
    """The content of a caption file, however faulty."""
    try:
        size = path.stat().st_size
        check_caption_size(size, path.name)
        data = read_file(path)
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return CaptionContent(data=None, problem=f"{path.name} cannot be read ({error.strerror})")
    except UserError as error:
        return CaptionContent(data=None, problem=error.what)
    try:
        return CaptionContent(data=data, text=tidy_ends(decode_text(data, path.name)))
    except UserError as error:
        return CaptionContent(data=data, text=tidy_ends(data.decode("cp1252", "replace")), problem=error.what)


def tidy_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def encode_caption(text: str) -> bytes:
    """The content of the file of a caption: UTF-8 with a line break at its end; nothing for an empty one."""
    text = tidy_ends(text)
    if "\0" in text:
        raise ValueError("the caption has NUL letters")
    data = f"{text}\n".encode(errors="backslashreplace") if text else b""
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError("the caption is too long")
    return data
