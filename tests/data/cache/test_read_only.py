"""A cache on a folder that cannot be written: what is in it is used."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sfumato.data.cache.entries import make_key
from sfumato.data.cache.store import DiskStore
from sfumato.errors import UserError

KEYS = [make_key("x", str(i)) for i in range(4)]


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with three entries, into which nobody, root included, can write."""
    store = DiskStore(tmp_path)
    for key in KEYS[:3]:
        store.put(key, b"content of " + key)
    store.close()
    normal = os.open

    def refuse(path: Any, flags: int, *more: int, **named: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return normal(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    return tmp_path


@pytest.mark.parametrize("missing", ["", "lock", "index.sqlite"])
def test_what_is_there_is_used(missing: str, read_only: Path) -> None:
    if missing:
        (read_only / missing).unlink()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in read_only.rglob("*")}
    store = DiskStore(read_only)
    assert not store.writable
    assert store.find_missing(KEYS) == KEYS[3:]
    assert [store.get(key) for key in KEYS[:3]] == [b"content of " + key for key in KEYS[:3]]
    store.check(KEYS[:3])
    assert not store.lock_exclusively() or missing != "lock"
    store.close()
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in read_only.rglob("*")} == before


def test_what_is_missing_cannot_be_added(read_only: Path) -> None:
    store = DiskStore(read_only)
    with pytest.raises(UserError, match="Read-only") as caught:
        store.put(KEYS[3], b"new")
    assert caught.value.code == "cache-write-failed"
    store.close()


def test_damage_is_reported_and_counts_as_missing(read_only: Path) -> None:
    (shard,) = (read_only / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store = DiskStore(read_only)
    store.check(KEYS[:3])
    assert store.find_missing(KEYS) == KEYS[2:]
    store.close()
