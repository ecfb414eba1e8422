"""What the program itself stored and reads again: the index of a folder, cache shards, their index, references."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fuzz.archives import SEEDS
from fuzz.images import make_image
from fuzz.subset import make_subset
from fuzz.target import Setup, target
from sfumato.data.cache.entries import TensorCache
from sfumato.data.cache.maintenance import count_records, read_records
from sfumato.data.cache.references import CacheReference, read_references, write_reference
from sfumato.data.cache.store import DiskStore
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import read_captions, read_images
from sfumato.data.find.index import Index
from sfumato.data.find.policy import Policy
from sfumato.data.find.tar_source import load_shard
from sfumato.errors import Problems

KEYS = [bytes([number]) * 20 for number in range(4)]
NPY_TOKENS = (b"\x93NUMPY", b"'descr': '<i8'", b"'descr': '|O'", b"(1099511627776,)", b"(-1,)", b"PK\3\4", b"PK\5\6")


def quiet() -> None:
    """Damaged records are reported in warnings, thousands of them here."""
    logging.getLogger("sfumato").setLevel(logging.ERROR)


def remembered(index: Index, read: Callable[[], object]) -> Setup:
    """A reader with an index of its own. It writes the index again, so a good one is kept aside."""
    read()
    return Setup(seeds=[index.path.read_bytes()], read=lambda data: (index.path.write_bytes(data), read()))


@target(*NPY_TOKENS)
def folder_index(folder: Path) -> Setup:
    (folder / "a.png").write_bytes(make_image("PNG"))
    (folder / "b.jpg").write_bytes(make_image("JPEG"))
    index = Index(folder, ("images", str(folder)))

    def read() -> None:
        images = read_images(str(folder), ["a.png", "b.jpg"], index)
        rows = images.make_table(str(folder), np.arange(2))
        assert [(row.width, row.height) for row in rows] == [(17, 12), (17, 12)], "never stale"

    return remembered(index, read)


@target(*NPY_TOKENS, share=0.5)
def caption_index(folder: Path) -> Setup:
    (folder / "a.txt").write_text("a cat", encoding="utf-8")
    index = Index(folder, ("captions", str(folder)))
    return remembered(index, lambda: list(read_captions(str(folder), ["a.txt"], index).texts))


@target(*NPY_TOKENS, share=0.5)
def archive_index(folder: Path) -> Setup:
    path = folder / "a.tar"
    path.write_bytes(SEEDS[0])
    policy = Policy(on_missing_caption="error", on_bad_image="error", cache_dir=folder)
    subset = make_subset(path)
    extensions = [".txt", ".caption", ".json"]

    def read() -> None:
        shard = load_shard(str(path), subset, policy, Findings(Problems(), strict=False, notes=[]))
        assert list(shard.names) == ["a.png", "b.jpg"]

    return remembered(Index(folder, ("archive", str(path), *extensions)), read)


def make_store(folder: Path) -> Path:
    """A store with a few entries; returns its only shard."""
    quiet()
    store = DiskStore(folder)
    cache = TensorCache(store)
    for number, key in enumerate(KEYS[:3]):
        cache.put(key, {"latents": torch.arange(number + 1.0)})
    store.put(KEYS[3], bytes(20))
    store.close()
    return next((folder / "shards").iterdir())


def read_store(folder: Path) -> None:
    """As training and `dataset cache --verify` read it. An entry is right or missing."""
    store = DiskStore(folder)
    try:
        cache = TensorCache(store)
        for number, key in enumerate(KEYS[:3]):
            tensors = cache.get(key)
            assert tensors is None or torch.equal(tensors["latents"], torch.arange(number + 1.0)), "never wrong"
        count_records(read_records(store, check=True))
    finally:
        store.close()


@target(b"sfR1", share=0.5)
def cache_shard(folder: Path) -> Setup:
    shard = make_store(folder)
    seed = shard.read_bytes()

    def read(data: bytes) -> None:
        (folder / "index.sqlite").unlink(missing_ok=True)
        shard.write_bytes(data)
        read_store(folder)

    return Setup(seeds=[seed], read=read)


@target(b"SQLite format 3\0", share=0.3)
def cache_index(folder: Path) -> Setup:
    make_store(folder)
    path = folder / "index.sqlite"
    seed = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_store(folder)

    return Setup(seeds=[seed], read=read)


@target(b'"keys": 0', b'"places": null', share=0.5)
def cache_reference(folder: Path) -> Setup:
    reference = CacheReference(cache=folder, content_type="latents", sources=("/a",), fingerprint="f", sizes=("512",))
    write_reference(reference, KEYS)
    seed = reference.path.read_bytes()

    def read(data: bytes) -> object:
        reference.path.write_bytes(data)
        return read_references(folder)

    return Setup(seeds=[seed], read=read)
