"""Maintenance of a cache folder: counts, faults, what is pruned and what is never pruned."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from sfumato.data.cache import maintenance
from sfumato.data.cache import store as store_module
from sfumato.data.cache.entries import LATENTS, ContentHashes, LatentKeys, TensorCache, TextKeys, make_key
from sfumato.data.cache.filling import fill_latents, fill_text, list_latent_items
from sfumato.data.cache.maintenance import (
    DAMAGED,
    HASHES,
    REPEATED,
    TEXT,
    TORN,
    USEFUL_TYPES,
    collect_keys,
    count_records,
    prune,
    read_records,
)
from sfumato.data.cache.references import CacheReference, read_references, select_current, write_reference
from sfumato.data.cache.shards import HEADER_BYTES
from sfumato.data.cache.sharing import FillOptions
from sfumato.data.cache.store import DiskStore
from sfumato.errors import UserError

NAMES = TextKeys(fingerprint="clip")


def encode(pixels, seeds):
    return torch.nn.functional.avg_pool2d(pixels, 8)


def features(captions):
    return [{"hidden": torch.full((3,), float(len(caption)))} for caption in captions]


@pytest.fixture
def filled(find, write_images, tmp_path):
    """Fill a cache folder with four images and their captions, as a new run does; again after changes."""
    if not (tmp_path / "a").exists():
        write_images(tmp_path / "a", 4)

    def fill(folder: Path = tmp_path / "c", subset: str = "a", encoder: str = "vae") -> Path:
        plan = find.toml(
            f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{{root}}/{subset}'\n",
            "--on_missing_caption", "empty",
        )  # fmt: skip
        store = DiskStore(folder)
        names = LatentKeys(fingerprint=encoder, dtype=torch.float32, hashes=ContentHashes(store))
        reference = CacheReference(
            cache=folder, content_type="latents", sources=(str(tmp_path / subset),), fingerprint=encoder
        )
        fill_latents(
            TensorCache(store), names, list_latent_items(plan), encode, options=FillOptions(reference=reference)
        )
        captions = [item.image.caption for _, _, item in plan.iterate_used()]
        text = CacheReference(
            cache=folder, content_type="text of clip", sources=(str(tmp_path / subset),), fingerprint="clip"
        )
        fill_text(TensorCache(store), NAMES, captions, features, options=FillOptions(reference=text))
        store.close()
        return folder

    return fill


def count(folder: Path, *, read: bool = True) -> dict[str, int]:
    store = DiskStore(folder)
    found = {kind: amount.records for kind, amount in count_records(read_records(store, check=read)).items()}
    store.close()
    return found


def prune_unused(folder: Path, **options) -> int:
    keys = collect_keys(select_current(read_references(folder), **options))
    store = DiskStore(folder)
    freed = prune(store, list(read_records(store, check=True)), lambda record: record.key in keys)
    store.close()
    return freed


def find_shard(folder: Path) -> Path:
    (shard,) = (folder / "shards").iterdir()
    return shard


@pytest.mark.parametrize("read", [True, False])
def test_counts_by_type(filled, read):
    folder = filled()
    assert count(folder, read=read) == {LATENTS: 4, TEXT: 4, HASHES: 4}
    store = DiskStore(folder)
    sizes = count_records(read_records(store, check=read))
    assert sum(amount.bytes for amount in sizes.values()) == find_shard(folder).stat().st_size


@pytest.mark.parametrize("where", ["header", "content"])
def test_damage_is_found_and_only_that(filled, where):
    folder = filled()
    shard = find_shard(folder)
    data = bytearray(shard.read_bytes())
    second = data.index(b"sfR1", 5)
    data[second + (6 if where == "header" else HEADER_BYTES + 5)] ^= 1
    shard.write_bytes(data)
    found = count(folder)
    assert found[DAMAGED] == 1
    assert sum(found.get(kind, 0) for kind in USEFUL_TYPES) == 11


def test_an_intact_record_that_is_no_entry_is_found(filled):
    folder = filled()
    store = DiskStore(folder)
    store.put(make_key("strange"), b"\x08\0\0\0\0\0\0\0{}      and more")
    store.close()
    assert count(folder)[DAMAGED] == 1


def test_a_torn_end_is_found_and_pruned(filled):
    folder = filled()
    shard = find_shard(folder)
    os.truncate(shard, shard.stat().st_size - 10)
    assert count(folder) == {LATENTS: 4, TEXT: 3, HASHES: 4, TORN: 1}
    prune_unused(folder)
    assert count(folder) == {LATENTS: 4, TEXT: 3, HASHES: 4}


def test_nothing_that_a_dataset_needs_is_pruned(filled):
    folder = filled()
    before = find_shard(folder).read_bytes()
    assert prune_unused(folder) == 0
    assert find_shard(folder).read_bytes() == before


def test_entries_unused_after_a_change_are_pruned(filled, tmp_path):
    """One image and one caption change: one entry of each is no longer needed, and the new ones are kept."""
    from PIL import Image

    folder = filled()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a" / "img1.png")
    (tmp_path / "a" / "img2.txt").write_text("another")
    filled()
    assert count(folder) == {LATENTS: 5, TEXT: 5, HASHES: 5}
    assert prune_unused(folder) > 0
    assert count(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4}
    store = DiskStore(folder)
    cache = TensorCache(store)
    assert cache.get(NAMES.make_key("another"))["hidden"].tolist() == [7.0] * 3
    assert cache.get(NAMES.make_key("tag2, cat, a")) is None
    store.close()
    filled()
    assert count(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4}  # nothing needed was missing


def test_another_dataset_and_another_encoder_keep_theirs(filled, write_images, tmp_path):
    folder = filled()
    write_images(tmp_path / "b", 3, seed=1)
    filled(subset="b")
    filled(encoder="another")
    assert count(folder) == {LATENTS: 11, TEXT: 7, HASHES: 7}
    assert prune_unused(folder) == 0
    shutil.rmtree(tmp_path / "b")
    assert prune_unused(folder) > 0
    assert count(folder) == {LATENTS: 8, TEXT: 4, HASHES: 4}


def test_references_not_updated_for_long_are_pruned_on_request(filled):
    folder = filled()
    filled(encoder="another")
    for known in read_references(folder):
        if known.reference.fingerprint == "vae":
            os.utime(known.path, (time.time() - 40 * 86400,) * 2)
    assert prune_unused(folder, unused_days=50) == 0
    assert prune_unused(folder, unused_days=30) > 0
    assert count(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4}


def test_records_that_are_there_twice_are_kept_once(filled):
    folder = filled()
    copy = folder / "shards" / "copy.shard"
    copy.write_bytes(find_shard(folder).read_bytes())
    assert count(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4, REPEATED: 12}
    prune_unused(folder)
    assert count(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4}


def test_a_cache_in_use_is_not_pruned(filled):
    folder = filled()
    other = DiskStore(folder)
    before = find_shard(folder).read_bytes()
    store = DiskStore(folder)
    with pytest.raises(UserError) as error:
        prune(store, list(read_records(store, check=True)), lambda record: False)
    assert error.value.code == "cache-in-use"
    assert str(folder) in str(error.value)
    assert find_shard(folder).read_bytes() == before
    other.close()
    prune(store, list(read_records(store, check=True)), lambda record: False)
    assert not list((folder / "shards").iterdir())


def test_a_full_disk_while_pruning_loses_nothing(filled, monkeypatch):
    folder = filled()
    before = find_shard(folder).read_bytes()
    real, written = os.write, []

    def write(descriptor, data):
        written.append(len(data))
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(store_module.os, "write", write)
    store = DiskStore(folder)
    with pytest.raises(UserError, match="No space left on device") as error:
        prune(store, list(read_records(store, check=True)), lambda record: record.content_type == LATENTS)
    assert error.value.code == "cache-write-failed"
    monkeypatch.undo()
    store.close()
    assert find_shard(folder).read_bytes() == before


def test_a_kill_while_pruning_loses_nothing(filled, monkeypatch):
    """At every moment each needed record is intact in some shard."""
    folder = filled()
    states = []
    real = maintenance.ShardWriter.append

    def append(self, key, content):
        states.append(count_in_copy(folder))
        return real(self, key, content)

    def count_in_copy(folder: Path) -> int:
        copy = folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "shards", copy / "shards")
        return count(copy)[LATENTS]

    monkeypatch.setattr(maintenance.ShardWriter, "append", append)
    store = DiskStore(folder)
    prune(store, list(read_records(store, check=True)), lambda record: record.content_type == LATENTS)
    store.close()
    assert states == [4] * 4
    assert count(folder) == {LATENTS: 4}


def test_a_torn_reference_is_skipped(tmp_path):
    reference = CacheReference(cache=tmp_path, content_type="latents", sources=("x",), fingerprint="vae")
    write_reference(reference, [make_key("a"), make_key("b")])
    (known,) = read_references(tmp_path)
    assert known.reference == reference
    assert known.keys == {make_key("a"), make_key("b")}
    reference.path.write_bytes(reference.path.read_bytes()[:-3])
    assert read_references(tmp_path) == []
    assert select_current([known]) == []  # its folder is not there
