"""Cache stores: key -> bytes, in memory or in append-only shards with checksums and an index that can be rebuilt.

Each process writes its own shards, so several can fill a folder at the same time, also on shared disks. A key is made
from the content that its record depends on, so a record can be missing but never stale. If a process is killed, at most
the last record of a shard is torn, which its checksums show.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from sfumato.common.files import BINARY, open_descriptor
from sfumato.common.locks import lock_file
from sfumato.data.cache.shards import (
    HEADER_BYTES,
    RecordLocation,
    ShardWriter,
    parse_record_header,
    read_at,
    scan_records,
)
from sfumato.errors import UserError

log = logging.getLogger(__name__)
_T = TypeVar("_T")

SHARD_BYTES = 4 << 30  # after which a writer starts a new shard
RECORDS_PER_COMMIT = 1000  # after which a writer updates the index
CHECK_THREADS = 4  # that read records to check them
BROKEN = (sqlite3.Error, UnicodeDecodeError)  # of an index; the second where sqlite names what is damaged in it

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
    """A store in memory, of one process and one run."""

    shared = False  # whether other processes see its records
    writable = True

    def __init__(self) -> None:
        self._content: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self._content.get(key)

    def put(self, key: bytes, content: bytes) -> None:
        self._content[key] = content

    def find_missing(self, keys: Iterable[bytes]) -> list[bytes]:
        return [key for key in keys if key not in self._content]

    def check(self, keys: Iterable[bytes]) -> None:
        """Does nothing: memory is not damaged."""

    def refresh(self) -> None:
        """Does nothing: no other process adds records."""

    def flush(self) -> None:
        """Does nothing: nothing is written to disk."""

    def close(self) -> None:
        self._content.clear()


class DiskStore:
    """A store in a folder of shards. Threads may share one; each process opens its own."""

    shared = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._files: dict[str, int] = {}  # shard name -> descriptor for reading
        self._pending: dict[bytes, RecordLocation] = {}  # own records that are not in the index yet
        self._writer: ShardWriter | None = None
        try:
            self.shards.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the cache folder {self.shards} ({error.strerror})",
                code="cache-folder-not-created",
                fix="give a writable --cache_dir",
            ) from error
        self._lock_descriptor, self.writable = open_lock(folder / "lock")
        if self._lock_descriptor is not None and not lock_file(self._lock_descriptor, exclusive=False, wait=False):
            log.warning("waiting for another program that prunes the cache %s", folder)
            lock_file(self._lock_descriptor, exclusive=False, wait=True)
        path = folder / "index.sqlite"
        self._index = open_index(path) if self.writable else copy_index(path)
        self.refresh()

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def get(self, key: bytes) -> bytes | None:
        """The content; None if it is missing. A damaged record is reported in a warning and counts as missing."""
        for location in self._locate(key):
            content = self._read(key, location)
            if content is not None:
                return content
            self._forget(key, location)
        return None

    def put(self, key: bytes, content: bytes) -> None:
        """Append a record; UserError if the disk is full. Visible to other processes after their `refresh`."""
        with self._lock:
            if self._writer is None or self._writer.end >= SHARD_BYTES:
                self.flush()
                self._writer = ShardWriter(self.shards)
            self._pending[key] = self._writer.append(key, content)
            if len(self._pending) >= RECORDS_PER_COMMIT:
                self.flush()

    def find_missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """The keys without a record, in their order."""
        with self._lock:
            return [key for key in keys if not self._locate(key)]

    def check(self, keys: Iterable[bytes]) -> None:
        """Read the records of these keys, in their order on disk; damaged ones count as missing from now on."""
        located: list[tuple[RecordLocation, bytes]] = []
        with self._lock:
            for key in keys:
                located += [(location, key) for location in self._locate(key)[:1]]
        located.sort()
        with ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="sfumato-check") as pool:
            for _ in pool.map(lambda pair: self.get(pair[1]), located):
                pass

    def refresh(self) -> None:
        """Add to the index what other processes have appended, also one that was killed."""
        with self._lock:
            self.flush()
            self._safely(self._scan)

    def flush(self) -> None:
        """Add to the index what this process has appended."""
        with self._lock:
            if self._pending and self._writer is not None:
                self._safely(self._commit)
                self._pending.clear()

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
            if self._lock_descriptor is not None:
                os.close(self._lock_descriptor)

    def lock_exclusively(self) -> bool:
        """Lock the store until it is closed; False if another program has it open."""
        descriptor = self._lock_descriptor
        return descriptor is not None and lock_file(descriptor, exclusive=True, wait=False)

    def forget_shard(self, name: str) -> None:
        """Close a shard that is about to be deleted."""
        with self._lock:
            self.flush()
            if name in self._files:
                os.close(self._files.pop(name))

    def _locate(self, key: bytes) -> list[RecordLocation]:
        with self._lock:
            if key in self._pending:
                return [self._pending[key]]
            return self._safely(lambda: self._query(key))

    def _query(self, key: bytes) -> list[RecordLocation]:
        return [RecordLocation(*row) for row in self._index.execute(FIND, (key,))]

    def _read(self, key: bytes, location: RecordLocation) -> bytes | None:
        try:
            data = read_at(
                self._descriptor(location.shard), location.offset, HEADER_BYTES + location.length, self._lock
            )
        except OSError:
            return None
        header = parse_record_header(data[:HEADER_BYTES])
        content = data[HEADER_BYTES:]
        if header is None or header.key != key or header.length != len(content):
            return None
        return content if header.crc == zlib.crc32(content) else None

    def _descriptor(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = open_descriptor(self.shards / shard)[0]
            return self._files[shard]

    def _forget(self, key: bytes, location: RecordLocation) -> None:
        """Remove a damaged record from the index, with a warning, so that it is created again."""
        log.warning("cache record %s at byte %d of %s is damaged, ignored", key.hex(), location.offset, location.shard)
        with self._lock:
            self._pending.pop(key, None)
            self._safely(lambda: self._delete(key, location))

    def _delete(self, key: bytes, location: RecordLocation) -> None:
        with self._index:
            self._index.execute(FORGET, (key, location.offset, location.shard))

    def _commit(self) -> None:
        assert self._writer is not None
        with self._index:
            number = self._shard_id(self._writer.name)
            rows = [(key, number, location.offset, location.length) for key, location in self._pending.items()]
            self._index.executemany("insert or ignore into records values (?, ?, ?, ?)", rows)
            self._index.execute("update shards set scanned = ? where id = ?", (self._writer.end, number))

    def _shard_id(self, shard: str) -> int:
        self._index.execute("insert or ignore into shards values (null, ?, 0, 0)", (shard,))
        (number,) = self._index.execute("select id from shards where name = ?", (shard,)).fetchone()
        return number

    def _scan(self) -> None:
        """Update the index: new records, new shards, deleted shards."""
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

    def _scan_shard(self, name: str, start: int, size: int, reported: int) -> None:
        number = self._shard_id(name)
        end = start
        rows = []
        for header, offset in scan_records(self._descriptor(name), start, size, self._lock):
            rows.append((header.key, number, offset, header.length))
            end = offset + HEADER_BYTES + header.length
        self._index.executemany("insert or ignore into records values (?, ?, ?, ?)", rows)
        torn = size if end < size else 0
        if torn and torn != reported:
            log.warning("cache shard %s ends with %d bytes of a torn record, ignored", name, size - end)
        self._index.execute("update shards set scanned = ?, torn = ? where id = ?", (end, torn, number))

    def _safely(self, work: Callable[[], _T]) -> _T:
        """Run `work` on the index; if its file is damaged or locked, use a new one in memory, built from the shards."""
        try:
            return work()
        except BROKEN as error:
            log.warning("cannot use the cache index in %s (%s); reading the shards instead", self.folder, error)
            self._index.close()
            self._index = open_index(None)
            self._scan()
            return work()


def open_lock(path: Path) -> tuple[int | None, bool]:
    """(descriptor, whether the folder is writable) of a lock file; None where it is missing in a read-only folder."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666), True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    log.info("the cache %s is read-only: what is in it is used, and nothing is added", path.parent)
    try:
        return os.open(path, os.O_RDONLY | BINARY), False
    except OSError:
        return None, False


def copy_index(path: Path) -> sqlite3.Connection:
    """A copy in memory of an index that cannot be written; without one it is made from the shards."""
    index = open_index(None)
    if path.is_file():
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as stored:
                stored.backup(index)
                index.executescript(SCHEMA)
        except BROKEN as error:
            log.warning("cannot read the cache index %s (%s); reading the shards instead", path, error)
            return open_index(None)
    return index


def open_index(path: Path | None) -> sqlite3.Connection:
    """Open the index file, or a new one if it is damaged; in memory if the path is None or cannot be used."""
    for name in (path, path, None):
        try:
            index = sqlite3.connect(str(name) if name else ":memory:", timeout=60, check_same_thread=False)
            index.execute("pragma synchronous = off")  # a damaged index is rebuilt from the shards
            index.executescript(SCHEMA)
            return index
        except sqlite3.OperationalError as error:
            log.warning("cannot use the cache index %s (%s)", name, error)
        except BROKEN:
            log.warning("the cache index %s is damaged and is rebuilt", name)
            assert name is not None
            name.unlink(missing_ok=True)
    raise AssertionError("an index in memory can always be opened")
