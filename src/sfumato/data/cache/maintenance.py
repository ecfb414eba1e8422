"""Maintenance of a cache folder: what it contains, whether it is intact, and pruning what nobody needs."""

from __future__ import annotations

import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from safetensors import SafetensorError, deserialize

from sfumato.common.files import open_descriptor
from sfumato.common.json_toml import decode_json
from sfumato.data.cache.entries import LATENTS
from sfumato.data.cache.references import StoredReference
from sfumato.data.cache.shards import HEADER_BYTES, RecordLocation, ShardWriter, read_at, scan_records
from sfumato.data.cache.store import DiskStore
from sfumato.data.masks import MASK
from sfumato.errors import UserError

HASHES, NETWORKS, MASKS, TEXT = "content hashes", "hashes of networks", "masks", "text features"
DAMAGED, REPEATED, TORN = "damaged", "repeated", "torn"
HASH_TYPES = {20: HASHES, 32: NETWORKS}  # by their bytes
PREFIX_BYTES = 4096  # of a record that show its type: 8 bytes of length, then names and shapes as JSON
USEFUL_TYPES = (LATENTS, MASKS, TEXT, HASHES, NETWORKS)


def read_records(store: DiskStore, *, check: bool, progress: Callable[[int], None] | None = None) -> Iterator[Record]:
    """Every record of every shard; the second one of a key is "repeated", and the torn end of a shard is one, too.

    check: whether to check each record's content against its checksum and the format of its type. progress is called
    with the bytes of each record.
    """
    seen: set[bytes] = set()
    for name in list_store_shards(store):
        with open_shard(store, name) as (descriptor, size):
            end = 0
            for header, offset in scan_records(descriptor, 0, size, threading.RLock()):
                if offset > end:
                    yield Record(b"", RecordLocation(name, end, offset - end), DAMAGED)
                end = offset + HEADER_BYTES + header.length
                count = header.length if check else min(header.length, PREFIX_BYTES)
                content = read_at(descriptor, offset + HEADER_BYTES, count, threading.RLock())
                content_type = classify_record(content, header.length)
                if check and not is_intact(content, header.crc, content_type):
                    content_type = DAMAGED
                elif header.key in seen:
                    content_type = REPEATED
                else:
                    seen.add(header.key)
                yield Record(header.key, RecordLocation(name, offset, header.length), content_type)
                if progress is not None:
                    progress(HEADER_BYTES + header.length)
            if end < size:
                yield Record(b"", RecordLocation(name, end, size - end), TORN)


def classify_record(content: bytes, length: int) -> str:
    """The content type of a record, from its first bytes."""
    if length in HASH_TYPES:
        return HASH_TYPES[length]
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        names = decode_json(content[8:end])
    except ValueError:
        return DAMAGED
    if LATENTS in names:
        return LATENTS
    return MASKS if names.keys() - {"__metadata__"} == {MASK} else TEXT


def is_intact(content: bytes, crc: int, content_type: str) -> bool:
    if zlib.crc32(content) != crc:
        return False
    if content_type in HASH_TYPES.values():
        return True
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def prune(store: DiskStore, records: Iterable[Record], keep: Callable[[Record], bool]) -> int:
    """Rewrite the shards without the records that `keep` refuses; returns the number of bytes freed.

    records: all of them, from `read_records`. UserError if another program has the store open. The new shard is on disk
    before the old one is deleted, so that nothing is lost if the process is killed.
    """
    refuse_in_use(store)
    by_shard: dict[str, list[Record]] = {name: [] for name in list_store_shards(store)}
    for record in records:
        by_shard[record.location.shard].append(record)
    freed = 0
    for name, shard_records in by_shard.items():
        kept = [record for record in shard_records if record.content_type in USEFUL_TYPES and keep(record)]
        if len(kept) < len(shard_records) or not shard_records:
            size = (store.shards / name).stat().st_size
            freed += size - (move_records(store, name, kept) if kept else 0)
            store.forget_shard(name)
            (store.shards / name).unlink()
    store.refresh()
    return freed


def refuse_in_use(store: DiskStore) -> None:
    """Lock the store until it is closed; UserError if another program has it open."""
    if not store.lock_exclusively():
        raise UserError(
            f"the cache {store.folder} is in use by another program",
            code="cache-in-use",
            fix="prune it when that program has ended",
        )


def move_records(store: DiskStore, name: str, kept: list[Record]) -> int:
    """Copy records of a shard into a new one, which is deleted on failure; returns its size in bytes."""
    writer = ShardWriter(store.shards)
    try:
        with open_shard(store, name) as (descriptor, _):
            for record in kept:
                start = record.location.offset + HEADER_BYTES
                content = read_at(descriptor, start, record.location.length, threading.RLock())
                writer.append(record.key, content)
        writer.sync()
    except (UserError, OSError):
        (store.shards / writer.name).unlink()
        raise
    finally:
        writer.close()
    return writer.end


def collect_keys(references: Collection[StoredReference]) -> frozenset[bytes]:
    """The keys that any of the references needs."""
    return frozenset().union(*(stored.keys for stored in references))


def count_records(records: Iterable[Record]) -> dict[str, RecordTotals]:
    """Content type -> numbers of records and bytes."""
    counts, sizes = Counter[str](), Counter[str]()
    for record in records:
        counts[record.content_type] += 1
        sizes[record.content_type] += record.location.length + (HEADER_BYTES if record.key else 0)
    types = (*USEFUL_TYPES, REPEATED, DAMAGED, TORN)
    return {name: RecordTotals(counts[name], sizes[name]) for name in types if counts[name]}


@contextmanager
def open_shard(store: DiskStore, name: str) -> Iterator[tuple[int, int]]:
    """(descriptor for reading, size in bytes) of a shard."""
    descriptor, status = open_descriptor(store.shards / name)
    try:
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def list_store_shards(store: DiskStore) -> list[str]:
    return sorted(path.name for path in store.shards.glob("*.shard"))


class Record(NamedTuple):
    """One record on disk; the key is empty for bytes that belong to none."""

    key: bytes
    location: RecordLocation
    content_type: str


class RecordTotals(NamedTuple):
    """The number of records, and their size."""

    records: int
    bytes: int
