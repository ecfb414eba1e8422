"""Named bytes that survive: append-only shards with checksums, and an index that can be rebuilt from them.

Every process writes shards of its own, so several may fill a folder at once, on shared disks too. A record is named by
the content that it was made from: it can be missing but never stale. A kill at any moment leaves at most a torn record
at the end of a shard, which is never read as whole.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import struct
import sys
import threading
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from sfumato.data.find.headers import BINARY
from sfumato.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

KEY = 20  # bytes
MAGIC = b"sfR1"
HEADER = struct.Struct(f"<4s{KEY}sQI")  # magic, key, length and CRC-32 of the content
CHECK = struct.Struct("<I")  # CRC-32 of the header
BEFORE = HEADER.size + CHECK.size  # bytes before the content
SHARD = 4 << 30  # bytes after which a writer begins a new shard
COMMIT = 1000  # records after which a writer tells the index
STRETCH = 1 << 20  # bytes looked through at a time for the next whole header
READERS = 4  # threads that check records

SCHEMA = """
create table if not exists shards (id integer primary key, name text unique, scanned integer, torn integer);
create table if not exists records (key blob, shard integer, place integer, length integer,
    primary key (key, shard, place)) without rowid;
"""
FIND = """
select name, place, length from records join shards on shards.id = records.shard where key = ? order by shard desc
"""
FORGET = "delete from records where key = ? and place = ? and shard = (select id from shards where name = ?)"


class MemoryStore:
    """The same for one process and one run."""

    shared = False  # whether other processes see what this one puts

    def __init__(self) -> None:
        self._content: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self._content.get(key)

    def put(self, key: bytes, content: bytes) -> None:
        self._content[key] = content

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        return [key for key in keys if key not in self._content]

    def check(self, keys: Iterable[bytes]) -> None:
        """Nothing: memory is not damaged."""

    def refresh(self) -> None:
        """Nothing: no other process adds to it."""

    def flush(self) -> None:
        """Nothing: it ends with the process."""

    def close(self) -> None:
        self._content.clear()


class DiskStore:
    """A folder of shards. Threads of a process may share one; processes open their own."""

    shared = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._files: dict[str, int] = {}  # shard name -> descriptor for reading
        self._fresh: dict[bytes, Place] = {}  # own records that the index does not know yet
        self._writer: Writer | None = None
        try:
            self.shards.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "give a writable --cache_dir"
            raise UserError(f"cannot make the cache folder {self.shards} ({error.strerror})", fix=fix) from error
        self._use = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        if not hold(self._use, alone=False, wait=False):
            log.warning("waiting for another program, which is pruning the cache %s", folder)
            hold(self._use, alone=False, wait=True)
        self._index = open_index(folder / "index.sqlite")
        self.refresh()

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def get(self, key: bytes) -> bytes | None:
        """The content, or None. A record that is damaged is a miss, told in one warning that names it."""
        for place in self._places(key):
            content = self._read(key, place)
            if content is not None:
                return content
            self._forget(key, place)
        return None

    def put(self, key: bytes, content: bytes) -> None:
        """Append a record; UserError where the disk is full. Visible to other processes after their `refresh`."""
        with self._lock:
            if self._writer is None or self._writer.end >= SHARD:
                self.flush()
                self._writer = Writer(self.shards)
            place = self._writer.append(key, content)
            self._fresh[key] = place
            if len(self._fresh) >= COMMIT:
                self.flush()

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """The keys without a record, in their order."""
        with self._lock:
            return [key for key in keys if not self._places(key)]

    def check(self, keys: Iterable[bytes]) -> None:
        """Read the records of these keys, in their order on disk; those that are damaged are misses from now on."""
        with self._lock:
            found = sorted((place, key) for key in keys for place in self._places(key)[:1])
        with ThreadPoolExecutor(READERS, thread_name_prefix="sfumato-check") as pool:
            for _ in pool.map(lambda pair: self.get(pair[1]), found):
                pass

    def refresh(self) -> None:
        """Take in what other processes have appended, and what a killed one left behind."""
        with self._lock:
            self.flush()
            self._safely(self._scan)

    def flush(self) -> None:
        """Tell the index what this process appended."""
        with self._lock:
            if self._fresh and self._writer is not None:
                self._safely(self._commit)
                self._fresh.clear()

    def close(self) -> None:
        with self._lock:
            self.flush()
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()
            self._index.close()
            os.close(self._use)

    def alone(self) -> bool:
        """Whether no other program has the store open, and none can open it until this one closes it."""
        return hold(self._use, alone=True, wait=False)

    def forget_shard(self, name: str) -> None:
        """Let go of a shard that is about to be deleted."""
        with self._lock:
            self.flush()
            if name in self._files:
                os.close(self._files.pop(name))

    def _places(self, key: bytes) -> list[Place]:
        with self._lock:
            if key in self._fresh:
                return [self._fresh[key]]
            return self._safely(lambda: self._find(key))

    def _find(self, key: bytes) -> list[Place]:
        return [Place(*row) for row in self._index.execute(FIND, (key,))]

    def _read(self, key: bytes, place: Place) -> bytes | None:
        try:
            data = read_at(self._descriptor(place.shard), place.offset, BEFORE + place.length, self._lock)
        except OSError:
            return None
        header = parsed(data[:BEFORE])
        content = data[BEFORE:]
        if header is None or header.key != key or header.length != len(content):
            return None
        return content if header.crc == zlib.crc32(content) else None

    def _descriptor(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self.shards / shard, os.O_RDONLY | BINARY)
            return self._files[shard]

    def _forget(self, key: bytes, place: Place) -> None:
        """Warn, and leave a damaged record out of the index, so that it is made anew."""
        log.warning("cache record %s at byte %d of %s is damaged and not used", key.hex(), place.offset, place.shard)
        with self._lock:
            self._fresh.pop(key, None)
            self._safely(lambda: self._delete(key, place))

    def _delete(self, key: bytes, place: Place) -> None:
        with self._index:
            self._index.execute(FORGET, (key, place.offset, place.shard))

    def _commit(self) -> None:
        assert self._writer is not None
        with self._index:
            number = self._number(self._writer.name)
            rows = [(key, number, place.offset, place.length) for key, place in self._fresh.items()]
            self._index.executemany("insert or ignore into records values (?, ?, ?, ?)", rows)
            self._index.execute("update shards set scanned = ? where id = ?", (self._writer.end, number))

    def _number(self, shard: str) -> int:
        self._index.execute("insert or ignore into shards values (null, ?, 0, 0)", (shard,))
        (number,) = self._index.execute("select id from shards where name = ?", (shard,)).fetchone()
        return number

    def _scan(self) -> None:
        """Bring the index up to date with the shards: new records, new shards, shards that were deleted."""
        with os.scandir(self.shards) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".shard")}
        known = {row[1]: row for row in self._index.execute("select id, name, scanned, torn from shards")}
        with self._index:
            for name in known.keys() - sizes.keys():
                self._index.execute("delete from records where shard = ?", (known[name][0],))
                self._index.execute("delete from shards where id = ?", (known[name][0],))
            for name, size in sorted(sizes.items()):
                _, _, scanned, torn = known.get(name, (0, name, 0, 0))
                if size > scanned:
                    self._scan_shard(name, scanned, size, torn)

    def _scan_shard(self, name: str, start: int, size: int, told: int) -> None:
        number = self._number(name)
        end = start
        rows = []
        for header, offset in records(self._descriptor(name), start, size, self._lock):
            rows.append((header.key, number, offset, header.length))
            end = offset + BEFORE + header.length
        self._index.executemany("insert or ignore into records values (?, ?, ?, ?)", rows)
        torn = size if end < size else 0
        if torn and torn != told:
            log.warning("cache shard %s ends in %d bytes of a torn record, which is not used", name, size - end)
        self._index.execute("update shards set scanned = ?, torn = ? where id = ?", (end, torn, number))

    def _safely(self, work: Callable[[], T]) -> T:
        """Work on the index; if its file is damaged or locked, go on with one in memory, made from the shards."""
        try:
            return work()
        except sqlite3.Error as error:
            log.warning("the cache index %s cannot be used (%s); reading the shards instead", self.folder, error)
            self._index.close()
            self._index = open_index(None)
            self._scan()
            return work()


class Writer:
    """The shard that a process appends to."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{os.getpid()}-{uuid.uuid4().hex}.shard"
        self.end = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | BINARY
        try:
            self._descriptor = os.open(folder / self.name, flags, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write into the cache {folder} ({error.strerror})", fix="give --cache_dir"
            ) from error
        self._process = os.getpid()

    def append(self, key: bytes, content: bytes) -> Place:
        assert self._process == os.getpid(), "a store is not shared by forking"
        assert len(key) == KEY
        header = HEADER.pack(MAGIC, key, len(content), zlib.crc32(content))
        record = header + CHECK.pack(zlib.crc32(header)) + content
        try:
            written = 0
            while written < len(record):
                written += os.write(self._descriptor, memoryview(record)[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, self.end)
            raise UserError(
                f"cannot write into the cache ({error.strerror})", fix="free disk space, or give another --cache_dir"
            ) from error
        place = Place(self.name, self.end, len(content))
        self.end += len(record)
        return place

    def sync(self) -> None:
        """Make what was written durable."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class Place(NamedTuple):
    """Where a record lies."""

    shard: str
    offset: int
    length: int  # of the content


class Header(NamedTuple):
    """What stands before a record's content."""

    key: bytes
    length: int
    crc: int


def parsed(data: bytes) -> Header | None:
    """None where the bytes are no whole header."""
    if len(data) < BEFORE or CHECK.unpack_from(data, HEADER.size)[0] != zlib.crc32(data[: HEADER.size]):
        return None
    magic, key, length, crc = HEADER.unpack_from(data)
    return Header(key, length, crc) if magic == MAGIC else None


def records(descriptor: int, start: int, size: int, lock: threading.RLock) -> Iterator[tuple[Header, int]]:
    """The whole records from `start` on, without their contents; a damaged header costs one record, not the rest.

    Stops at a record that is torn: what follows it is not there yet, or never will be.
    """
    offset = start
    while offset + BEFORE <= size:
        header = parsed(read_at(descriptor, offset, BEFORE, lock))
        if header is None:
            following = next_header(descriptor, offset + 1, size, lock)
            if following is None:
                return
            offset = following
            continue
        if offset + BEFORE + header.length > size:
            return
        yield header, offset
        offset += BEFORE + header.length


def next_header(descriptor: int, start: int, size: int, lock: threading.RLock) -> int | None:
    """Where the next whole header begins."""
    for offset in range(start, size - BEFORE + 1, STRETCH):
        data = read_at(descriptor, offset, min(STRETCH + BEFORE, size - offset), lock)
        place = data.find(MAGIC)
        while 0 <= place < STRETCH:
            if parsed(data[place : place + BEFORE]) is not None:
                return offset + place
            place = data.find(MAGIC, place + 1)
    return None


def read_at(descriptor: int, offset: int, count: int, lock: threading.RLock) -> bytes:
    """Read without moving a shared position."""
    if os.name != "nt":
        return os.pread(descriptor, count, offset)
    with lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)


def hold(descriptor: int, *, alone: bool, wait: bool) -> bool:
    """Hold a file together with others, or alone; False where it cannot be had. Let go of when the process ends.

    Where a file system knows no locks, or the system is Windows, nothing is held and the answer is True.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True


def open_index(path: Path | None) -> sqlite3.Connection:
    """The index file, made anew if it is damaged; in memory if there is none or it cannot be used."""
    for name in (path, path, None):
        try:
            index = sqlite3.connect(str(name) if name else ":memory:", timeout=60, check_same_thread=False)
            index.execute("pragma synchronous = off")  # the shards are the truth; a damaged index is made anew
            index.executescript(SCHEMA)
            return index
        except sqlite3.OperationalError as error:
            log.warning("the cache index %s cannot be used (%s)", name, error)
        except sqlite3.DatabaseError:
            log.warning("the cache index %s is damaged and made anew", name)
            assert name is not None
            name.unlink(missing_ok=True)
    raise AssertionError("an index in memory can always be opened")
