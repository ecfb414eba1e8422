"""Looking after a cache folder: what lies in it, whether it is whole, and dropping what nobody needs."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from safetensors import SafetensorError, deserialize

from sfumato.data.cache.entries import LATENTS
from sfumato.data.cache.references import KnownUse
from sfumato.data.cache.store import BEFORE, DiskStore, Place, Writer, read_at, records
from sfumato.data.find.headers import BINARY
from sfumato.data.masks import MASK
from sfumato.errors import UserError

HASHES, MASKS, TEXT, DAMAGED, AGAIN, TORN = "content hashes", "masks", "text features", "damaged", "repeated", "torn"
HASH = 20  # bytes of a content hash
HEAD = 4096  # bytes of a record that tell its kind: 8 of length, then names and shapes as JSON
KEPT = (LATENTS, MASKS, TEXT, HASHES)  # kinds of records that are of use


def survey(store: DiskStore, *, read: bool, progress: Callable[[int], None] | None = None) -> Iterator[Record]:
    """Every record of every shard; the second of a key is "repeated", and a shard's torn end counts as one, too.

    read: check each record's content against its checksum, and that it holds what its kind should. progress is called
    with the bytes of each.
    """
    seen: set[bytes] = set()
    for name in shard_names(store):
        with opened(store, name) as (descriptor, size):
            end = 0
            for header, offset in records(descriptor, 0, size, threading.RLock()):
                if offset > end:
                    yield Record(b"", Place(name, end, offset - end), DAMAGED)
                end = offset + BEFORE + header.length
                count = header.length if read else min(header.length, HEAD)
                content = read_at(descriptor, offset + BEFORE, count, threading.RLock())
                kind = kind_of(content, header.length)
                if read and not whole(content, header.crc, kind):
                    kind = DAMAGED
                elif header.key in seen:
                    kind = AGAIN
                else:
                    seen.add(header.key)
                yield Record(header.key, Place(name, offset, header.length), kind)
                if progress is not None:
                    progress(BEFORE + header.length)
            if end < size:
                yield Record(b"", Place(name, end, size - end), TORN)


def kind_of(content: bytes, length: int) -> str:
    """What a record holds, told from its first bytes."""
    if length == HASH:
        return HASHES
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        names = json.loads(content[8:end])
    except ValueError:
        return DAMAGED
    if LATENTS in names:
        return LATENTS
    return MASKS if names.keys() - {"__metadata__"} == {MASK} else TEXT


def whole(content: bytes, crc: int, kind: str) -> bool:
    if zlib.crc32(content) != crc:
        return False
    if kind == HASHES:
        return True
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def prune(store: DiskStore, found: Iterable[Record], keep: Callable[[Record], bool]) -> int:
    """Rewrite the shards without the records, of those that `survey` read, not to be kept; gives the bytes set free.

    Only where no other program has the store open: UserError. What is kept is on disk in its new place before the old
    shard goes, so a kill at any moment loses nothing.
    """
    refuse_in_use(store)
    by_shard: dict[str, list[Record]] = {name: [] for name in shard_names(store)}
    for record in found:
        by_shard[record.place.shard].append(record)
    freed = 0
    for name, lying in by_shard.items():
        kept = [record for record in lying if record.kind in KEPT and keep(record)]
        if len(kept) < len(lying) or not lying:
            size = (store.shards / name).stat().st_size
            freed += size - (moved(store, name, kept) if kept else 0)
            store.forget_shard(name)
            (store.shards / name).unlink()
    store.refresh()
    return freed


def refuse_in_use(store: DiskStore) -> None:
    """From here on no other program can open the store until this one closes it; UserError where one has it open."""
    if not store.alone():
        raise UserError(f"the cache {store.folder} is in use by another program", fix="prune when that has ended")


def moved(store: DiskStore, name: str, kept: list[Record]) -> int:
    """Copy records of a shard into a new one; its bytes. A failure leaves no half of it."""
    writer = Writer(store.shards)
    try:
        with opened(store, name) as (descriptor, _):
            for record in kept:
                content = read_at(descriptor, record.place.offset + BEFORE, record.place.length, threading.RLock())
                writer.append(record.key, content)
        writer.sync()
    except (UserError, OSError):
        (store.shards / writer.name).unlink()
        raise
    finally:
        writer.close()
    return writer.end


def needed(uses: Collection[KnownUse]) -> frozenset[bytes]:
    return frozenset().union(*(use.keys for use in uses))


def tally(found: Iterable[Record]) -> dict[str, Amount]:
    """Records and bytes by kind."""
    counts, sizes = Counter[str](), Counter[str]()
    for record in found:
        counts[record.kind] += 1
        sizes[record.kind] += record.place.length + (BEFORE if record.key else 0)
    return {kind: Amount(counts[kind], sizes[kind]) for kind in (*KEPT, AGAIN, DAMAGED, TORN) if counts[kind]}


@contextmanager
def opened(store: DiskStore, name: str) -> Iterator[tuple[int, int]]:
    """A shard's descriptor for reading, and its size."""
    descriptor = os.open(store.shards / name, os.O_RDONLY | BINARY)
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def shard_names(store: DiskStore) -> list[str]:
    return sorted(path.name for path in store.shards.glob("*.shard"))


class Record(NamedTuple):
    """One record as it lies on disk; the key is empty for bytes that belong to none."""

    key: bytes
    place: Place
    kind: str


class Amount(NamedTuple):
    """How many, and how large."""

    records: int
    bytes: int
