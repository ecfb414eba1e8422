"""Pictures in columns: a million of them fit into memory, and each comes out as a tuple when it is asked for."""

from __future__ import annotations

import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Generic, NamedTuple, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from sfumato.errors import UserError

T = TypeVar("T")
Column = NDArray[np.int64]
CHUNK = 50_000  # rows made at once while going through all


class Picture(NamedTuple):
    """One image file and its caption."""

    path: str  # for a picture in an archive: the archive's, and its name in there
    bytes: int
    mtime_ns: int  # of the file, or of the archive
    width: int  # as shown, after turning by the EXIF orientation
    height: int
    caption: str
    archive: str = ""
    offset: int = 0  # of its first byte in the archive

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    def read(self) -> bytes:
        """The bytes of the image file; UserError, which names it, where they cannot be read."""
        try:
            with open(self.archive or self.path, "rb") as file:  # noqa: PTH123 -- called for each of millions
                if not self.archive:
                    return file.read()
                file.seek(self.offset)
                data = file.read(self.bytes)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from error
        if len(data) < self.bytes:
            raise UserError(f"{self.path} is cut short", fix=f"{self.archive} has changed; start again")
        return data

    def is_unchanged(self) -> bool:
        """Whether its file, or its archive, has the size and time it had when it was found."""
        facts = os.stat(self.archive or self.path)  # noqa: PTH116
        return facts.st_mtime_ns == self.mtime_ns and (bool(self.archive) or facts.st_size == self.bytes)


class Rows(Sequence[T], Generic[T]):
    """What its kinds share: rows are made one at a time, and equal rows make equal sequences."""

    @abstractmethod
    def row(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.row(each) for each in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.row(place % len(self))

    def __iter__(self) -> Iterator[T]:
        return map(self.row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Texts(Rows[str]):
    """Many texts in one block of memory; UTF-8, where lone surrogates (odd file names) pass."""

    def __init__(self, block: bytearray | NDArray[np.uint8], ends: Column) -> None:
        self.block = memoryview(block)  # pyright: ignore[reportArgumentType] -- an array is one, too
        self.ends = ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        block, ends = bytearray(), array("q")
        for text in texts:
            block += text.encode("utf-8", "surrogatepass")
            ends.append(len(block))
        return cls(block, np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64))

    @classmethod
    def repeated(cls, text: str, count: int) -> Self:
        size = len(text.encode("utf-8", "surrogatepass"))
        return cls(bytearray(text.encode("utf-8", "surrogatepass") * count), np.arange(1, count + 1) * size)

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, place: int) -> str:
        start = self.ends[place - 1] if place else 0
        return str(self.block[start : self.ends[place]], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), CHUNK):
            for end in self.ends[first : first + CHUNK].tolist():
                yield str(self.block[start:end], "utf-8", "surrogatepass")
                start = end

    def same_as(self, other: Texts) -> bool:
        """Whether all texts are the same; much faster than ==."""
        return np.array_equal(self.ends, other.ends) and self.block == other.block


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures(Rows[Picture]):
    """The pictures of a subset; every column has one entry for each."""

    origins: tuple[str, ...]  # folders or archives, with which the paths begin
    names: Texts  # what follows
    byte_counts: Column
    mtimes: Column
    widths: Column
    heights: Column
    captions: Texts
    origin: Column | None = None  # which of the origins; None where there is one
    offsets: Column | None = None  # in the archive; None for files of their own
    conditioning: Pictures | None = None  # the mask or control image of each

    @classmethod
    def of(cls, pictures: Sequence[Picture]) -> Self:
        """From single pictures, none of them in an archive."""
        rows = np.array([picture[1:5] for picture in pictures], np.int64).reshape(len(pictures), 4)
        return cls(
            origins=("",),
            names=Texts.of(picture.path for picture in pictures),
            byte_counts=rows[:, 0], mtimes=rows[:, 1], widths=rows[:, 2], heights=rows[:, 3],
            captions=Texts.of(picture.caption for picture in pictures),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    def row(self, place: int) -> Picture:
        archived = self.offsets is not None
        origin = self._origin(place)
        return Picture(
            path_of(origin, self.names.row(place)),
            int(self.byte_counts[place]),
            int(self.mtimes[place]),
            int(self.widths[place]),
            int(self.heights[place]),
            self.captions.row(place),
            origin if archived else "",
            int(self.offsets[place]) if self.offsets is not None else 0,
        )

    def path(self, place: int) -> str:
        return path_of(self._origin(place), self.names.row(place))

    def paths(self) -> Iterator[str]:
        return (path_of(self._origin(place), name) for place, name in enumerate(self.names))

    def _origin(self, place: int) -> str:
        return self.origins[0 if self.origin is None else int(self.origin[place])]

    def take(self, rows: Column) -> Pictures:
        """Those at these places, in this order."""
        columns = {field.name: vars(self)[field.name] for field in fields(self)}
        taken = {name: taken_of(column, rows) for name, column in columns.items()}
        return Pictures(**taken)  # pyright: ignore[reportArgumentType]

    def captioned(self, captions: Texts, keep: Column) -> Pictures:
        """With these captions; only those at the places to keep."""
        assert len(captions) == len(self), "every picture has one caption"
        whole = replace(self, captions=captions)
        return whole if len(keep) == len(self) else whole.take(keep)

    def paired_with(self, conditioning: Pictures) -> Pictures:
        assert len(conditioning) == len(self), "every picture has one partner"
        return replace(self, conditioning=conditioning)

    def sizes(self) -> tuple[list[tuple[int, int]], Column]:
        """The distinct sizes, width and height as shown, and which of them each picture has."""
        packed, which = np.unique(self.widths << 32 | self.heights, return_inverse=True)
        return [(int(each) >> 32, int(each) & 0xFFFFFFFF) for each in packed], which


def taken_of(column: object, rows: Column) -> object:
    if isinstance(column, Texts):
        return Texts.of(column.row(place) for place in rows.tolist())
    if isinstance(column, Pictures):
        return column.take(rows)
    return column[rows] if isinstance(column, np.ndarray) else column


def path_of(origin: str, name: str) -> str:
    return f"{origin}{os.sep}{name}" if origin else name
