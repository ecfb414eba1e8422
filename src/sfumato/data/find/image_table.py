"""Images of a subset in columns: a million rows fit into memory, and a row is made when it is asked for."""

from __future__ import annotations

import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Generic, NamedTuple, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from sfumato.common.files import open_file
from sfumato.data.find.traits import PLAIN, Traits
from sfumato.errors import UserError

RowT = TypeVar("RowT")
IntColumn = NDArray[np.int64]
ROWS_AT_ONCE = 50_000  # rows converted at once while iterating


class ImageRow(NamedTuple):
    """One image file and its caption."""

    path: str  # for an image in an archive: the archive's path and the member's name
    byte_count: int
    mtime_ns: int  # of the file, or of the archive
    width: int  # pixels, after the EXIF orientation is applied
    height: int
    caption: str
    archive: str = ""
    offset: int = 0  # bytes, of the image in the archive
    traits: Traits = PLAIN

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    def read(self) -> bytes:
        """The bytes of the image file. UserError where they cannot be read."""
        try:
            with open_file(self.archive or self.path) as file:
                if not self.archive:
                    return file.read()
                file.seek(self.offset)
                data = file.read(self.byte_count)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror})",
                code="image-file-unreadable",
                fix="check that the file exists and may be read, or skip such images with --on_bad_image skip",
            ) from error
        if len(data) < self.byte_count:
            raise UserError(
                f"{self.path} is cut short",
                code="archived-image-cut-short",
                fix=f"{self.archive} has changed; start again",
            )
        return data

    def is_unchanged(self) -> bool:
        """Whether its file or archive still has the size and modification time of the listing."""
        stat = os.stat(self.archive or self.path)  # noqa: PTH116
        return stat.st_mtime_ns == self.mtime_ns and (bool(self.archive) or stat.st_size == self.byte_count)


class ColumnSequence(Sequence[RowT], Generic[RowT]):
    """A sequence whose rows are made from columns one at a time; equal rows make equal sequences."""

    @abstractmethod
    def get_row(self, index: int) -> RowT: ...

    @overload
    def __getitem__(self, index: int) -> RowT: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowT]: ...
    def __getitem__(self, index: int | slice) -> RowT | list[RowT]:
        if isinstance(index, slice):
            return [self.get_row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.get_row(index % len(self))

    def __iter__(self) -> Iterator[RowT]:
        return map(self.get_row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ColumnSequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class TextColumn(ColumnSequence[str]):
    """Many texts in one block of memory; UTF-8, with lone surrogates (undecodable file names) allowed."""

    def __init__(self, block: bytearray | NDArray[np.uint8], ends: IntColumn) -> None:
        self.block = memoryview(block)  # pyright: ignore[reportArgumentType] -- an array is one, too
        self.ends = ends

    @classmethod
    def encode(cls, texts: Iterable[str]) -> Self:
        block, ends = bytearray(), array("q")
        for text in texts:
            block += text.encode("utf-8", "surrogatepass")
            ends.append(len(block))
        return cls(block, np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64))

    @classmethod
    def repeat(cls, text: str, count: int) -> Self:
        """The same text `count` times."""
        size = len(text.encode("utf-8", "surrogatepass"))
        return cls(bytearray(text.encode("utf-8", "surrogatepass") * count), np.arange(1, count + 1) * size)

    def __len__(self) -> int:
        return len(self.ends)

    def get_row(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return str(self.block[start : self.ends[index]], "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), ROWS_AT_ONCE):
            for end in self.ends[first : first + ROWS_AT_ONCE].tolist():
                yield str(self.block[start:end], "utf-8", "surrogatepass")
                start = end

    def same_as(self, other: TextColumn) -> bool:
        """Whether all texts are the same; much faster than ==."""
        return np.array_equal(self.ends, other.ends) and self.block == other.block


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageTable(ColumnSequence[ImageRow]):
    """The images of a subset; every column has one entry per image."""

    origins: tuple[str, ...]  # folders or archives: the first part of each path
    names: TextColumn  # the rest of each path
    byte_counts: IntColumn
    mtimes: IntColumn  # nanoseconds
    widths: IntColumn
    heights: IntColumn
    captions: TextColumn
    origin: IntColumn | None = None  # index into `origins`; None where there is one
    offsets: IntColumn | None = None  # bytes, in the archive; None for plain files
    traits: IntColumn | None = None  # None where no image has any
    conditioning: ImageTable | None = None  # the mask or control image of each
    references: tuple[ImageTable, ...] = ()  # the reference images of each, one table for each folder

    @classmethod
    def from_rows(cls, rows: Sequence[ImageRow]) -> Self:
        """From single rows, none of them in an archive."""
        numbers = np.array([row[1:5] for row in rows], np.int64).reshape(len(rows), 4)
        return cls(
            origins=("",),
            names=TextColumn.encode(row.path for row in rows),
            byte_counts=numbers[:, 0],
            mtimes=numbers[:, 1],
            widths=numbers[:, 2],
            heights=numbers[:, 3],
            captions=TextColumn.encode(row.caption for row in rows),
        )

    def __len__(self) -> int:
        return len(self.names)

    def get_row(self, index: int) -> ImageRow:
        origin = self._get_origin(index)
        return ImageRow(
            join_path(origin, self.names.get_row(index)),
            int(self.byte_counts[index]),
            int(self.mtimes[index]),
            int(self.widths[index]),
            int(self.heights[index]),
            self.captions.get_row(index),
            origin if self.offsets is not None else "",
            int(self.offsets[index]) if self.offsets is not None else 0,
            int(self.traits[index]) if self.traits is not None else PLAIN,
        )

    def paths(self) -> Iterator[str]:
        return (join_path(self._get_origin(index), name) for index, name in enumerate(self.names))

    def _get_origin(self, index: int) -> str:
        return self.origins[0 if self.origin is None else int(self.origin[index])]

    def take(self, rows: IntColumn) -> ImageTable:
        """The rows at these indices, in this order."""
        columns = {field.name: take_rows(vars(self)[field.name], rows) for field in fields(self)}
        return ImageTable(**columns)  # pyright: ignore[reportArgumentType]

    def with_captions(self, captions: TextColumn, rows: IntColumn) -> ImageTable:
        """Only the rows at these indices. captions: of all rows."""
        assert len(captions) == len(self), "every image has one caption"
        captioned = replace(self, captions=captions)
        return captioned if len(rows) == len(self) else captioned.take(rows)

    def with_conditioning(self, conditioning: ImageTable) -> ImageTable:
        assert len(conditioning) == len(self), "every image has one conditioning image"
        return replace(self, conditioning=conditioning)

    def with_references(self, references: Sequence[ImageTable]) -> ImageTable:
        assert all(len(table) == len(self) for table in references), "every image has one reference of each folder"
        return replace(self, references=tuple(references))

    def sizes(self) -> tuple[list[tuple[int, int]], IntColumn]:
        """The distinct sizes, (width, height) in pixels, and the index of each image's size among them."""
        packed, size_index = np.unique(self.widths << 32 | self.heights, return_inverse=True)
        return [(int(size) >> 32, int(size) & 0xFFFFFFFF) for size in packed], size_index


def take_rows(column: object, rows: IntColumn) -> object:
    """A column's entries at these indices; what is no column is returned as it is."""
    if isinstance(column, TextColumn):
        return TextColumn.encode(column.get_row(row) for row in rows.tolist())
    if isinstance(column, ImageTable):
        return column.take(rows)
    if isinstance(column, tuple):
        return tuple(take_rows(each, rows) for each in column)
    return column[rows] if isinstance(column, np.ndarray) else column


def join_path(origin: str, name: str) -> str:
    return f"{origin}{os.sep}{name}" if origin else name
