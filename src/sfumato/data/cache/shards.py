"""The format of cache shards: append-only files of records, each with a header, checksums and its content."""

from __future__ import annotations

import os
import struct
import threading
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sfumato.common.files import BINARY
from sfumato.errors import UserError

KEY_BYTES = 20
MAGIC = b"sfR1"
HEADER_FORMAT = struct.Struct(f"<4s{KEY_BYTES}sQI")  # magic, key, length and CRC-32 of the content
CHECKSUM_FORMAT = struct.Struct("<I")  # CRC-32 of the header
HEADER_BYTES = HEADER_FORMAT.size + CHECKSUM_FORMAT.size  # before the content
SEARCH_BYTES = 1 << 20  # read at a time while searching for the next intact header


class ShardWriter:
    """Appends records to a new shard of this process; UserError if the disk is full or not writable."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = f"{os.getpid()}-{uuid.uuid4().hex}.shard"
        self.end = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | BINARY
        try:
            self._descriptor = os.open(folder / self.name, flags, 0o666)
        except OSError as error:
            raise make_write_error(folder, error) from error
        self._process = os.getpid()

    def append(self, key: bytes, content: bytes) -> RecordLocation:
        assert self._process == os.getpid(), "a store is not shared by forking"
        assert len(key) == KEY_BYTES
        header = HEADER_FORMAT.pack(MAGIC, key, len(content), zlib.crc32(content))
        record = header + CHECKSUM_FORMAT.pack(zlib.crc32(header)) + content
        try:
            written = 0
            while written < len(record):
                written += os.write(self._descriptor, memoryview(record)[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, self.end)
            raise make_write_error(self._folder, error) from error
        location = RecordLocation(self.name, self.end, len(content))
        self.end += len(record)
        return location

    def sync(self) -> None:
        """Flush the written records to disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def make_write_error(folder: Path, error: OSError) -> UserError:
    """The error for a cache folder that cannot be written."""
    return UserError(
        f"cannot write into the cache {folder} ({error.strerror})",
        code="cache-write-failed",
        fix="free disk space, or give another --cache_dir",
    )


class RecordLocation(NamedTuple):
    """The position of a record on disk."""

    shard: str
    offset: int
    length: int  # of the content


class RecordHeader(NamedTuple):
    """The bytes before a record's content."""

    key: bytes
    length: int
    crc: int


def parse_record_header(data: bytes) -> RecordHeader | None:
    """The header at the start of the bytes; None if it is not intact."""
    if len(data) < HEADER_BYTES:
        return None
    (checksum,) = CHECKSUM_FORMAT.unpack_from(data, HEADER_FORMAT.size)
    if checksum != zlib.crc32(data[: HEADER_FORMAT.size]):
        return None
    magic, key, length, crc = HEADER_FORMAT.unpack_from(data)
    return RecordHeader(key, length, crc) if magic == MAGIC else None


def scan_records(descriptor: int, start: int, size: int, lock: threading.RLock) -> Iterator[tuple[RecordHeader, int]]:
    """(header, offset) of the records from `start` on, without reading their contents.

    Skips a record with a damaged header. Stops at a torn record, which is still being written or never will be.
    """
    offset = start
    while offset + HEADER_BYTES <= size:
        header = parse_record_header(read_at(descriptor, offset, HEADER_BYTES, lock))
        if header is None:
            next_offset = find_next_header(descriptor, offset + 1, size, lock)
            if next_offset is None:
                return
            offset = next_offset
            continue
        if offset + HEADER_BYTES + header.length > size:
            return
        yield header, offset
        offset += HEADER_BYTES + header.length


def find_next_header(descriptor: int, start: int, size: int, lock: threading.RLock) -> int | None:
    """The offset of the next intact header; None if there is none."""
    for offset in range(start, size - HEADER_BYTES + 1, SEARCH_BYTES):
        data = read_at(descriptor, offset, min(SEARCH_BYTES + HEADER_BYTES, size - offset), lock)
        index = data.find(MAGIC)
        while 0 <= index < SEARCH_BYTES:
            if parse_record_header(data[index : index + HEADER_BYTES]) is not None:
                return offset + index
            index = data.find(MAGIC, index + 1)
    return None


def read_at(descriptor: int, offset: int, count: int, lock: threading.RLock) -> bytes:
    """Read bytes at an offset, safe for threads that share the descriptor."""
    if os.name != "nt":
        return os.pread(descriptor, count, offset)
    with lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)
