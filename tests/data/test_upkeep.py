"""Looking after a cache folder: counts, faults found, what is dropped and what is never dropped."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from sfumato.data.cache import maintenance as upkeep
from sfumato.data.cache import store as store_module
from sfumato.data.cache.entries import (
    LATENTS,
    ContentHashes,
    Filling,
    LatentNames,
    TensorCache,
    TextNames,
    fill_latents,
    fill_text,
    key_of,
    latent_places,
)
from sfumato.data.cache.maintenance import AGAIN, DAMAGED, HASHES, KEPT, TEXT, TORN, needed, prune, survey, tally
from sfumato.data.cache.references import Use, known_uses, remember, still_current
from sfumato.data.cache.store import BEFORE, DiskStore
from sfumato.errors import UserError

NAMES = TextNames(fingerprint="clip")


def encode(pixels, seeds):
    return torch.nn.functional.avg_pool2d(pixels, 8)


def features(captions):
    return [{"hidden": torch.full((3,), float(len(caption)))} for caption in captions]


@pytest.fixture
def filled(find, pictures, tmp_path):
    """Fill a cache folder with four pictures and their captions, as a new run does; again after changes."""
    if not (tmp_path / "a").exists():
        pictures(tmp_path / "a", 4)

    def fill(folder: Path = tmp_path / "c", subset: str = "a", encoder: str = "vae") -> Path:
        plan = find.toml(
            f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{{root}}/{subset}'\n",
            "--on_missing_caption", "empty",
        )  # fmt: skip
        store = DiskStore(folder)
        names = LatentNames(fingerprint=encoder, dtype=torch.float32, hashes=ContentHashes(store))
        use = Use(cache=folder, kind="latents", places=(str(tmp_path / subset),), encoder=encoder)
        fill_latents(TensorCache(store), names, latent_places(plan), encode, how=Filling(use=use))
        captions = [item.picture.caption for _, _, item in plan.used()]
        text = Use(cache=folder, kind="text of clip", places=(str(tmp_path / subset),), encoder="clip")
        fill_text(TensorCache(store), NAMES, captions, features, how=Filling(use=text))
        store.close()
        return folder

    return fill


def counted(folder: Path, *, read: bool = True) -> dict[str, int]:
    store = DiskStore(folder)
    found = {kind: amount.records for kind, amount in tally(survey(store, read=read)).items()}
    store.close()
    return found


def pruned(folder: Path, **options) -> int:
    keys = needed(still_current(known_uses(folder), **options))
    store = DiskStore(folder)
    freed = prune(store, list(survey(store, read=True)), lambda record: record.key in keys)
    store.close()
    return freed


def shard_of(folder: Path) -> Path:
    (shard,) = (folder / "shards").iterdir()
    return shard


@pytest.mark.parametrize("read", [True, False])
def test_counts_by_kind(filled, read):
    folder = filled()
    assert counted(folder, read=read) == {LATENTS: 4, TEXT: 4, HASHES: 4}
    store = DiskStore(folder)
    sizes = tally(survey(store, read=read))
    assert sum(amount.bytes for amount in sizes.values()) == shard_of(folder).stat().st_size


@pytest.mark.parametrize("where", ["header", "content"])
def test_damage_is_found_and_only_that(filled, where):
    folder = filled()
    shard = shard_of(folder)
    data = bytearray(shard.read_bytes())
    second = data.index(b"sfR1", 5)
    data[second + (6 if where == "header" else BEFORE + 5)] ^= 1
    shard.write_bytes(data)
    found = counted(folder)
    assert found[DAMAGED] == 1
    assert sum(found.get(kind, 0) for kind in KEPT) == 11


def test_a_record_that_is_whole_but_no_entry_is_found(filled):
    folder = filled()
    store = DiskStore(folder)
    store.put(key_of("strange"), b"\x08\0\0\0\0\0\0\0{}      and more")
    store.close()
    assert counted(folder)[DAMAGED] == 1


def test_a_torn_end_is_found_and_dropped(filled):
    folder = filled()
    shard = shard_of(folder)
    os.truncate(shard, shard.stat().st_size - 10)
    assert counted(folder) == {LATENTS: 4, TEXT: 3, HASHES: 4, TORN: 1}
    pruned(folder)
    assert counted(folder) == {LATENTS: 4, TEXT: 3, HASHES: 4}


def test_nothing_is_dropped_that_a_dataset_needs(filled):
    folder = filled()
    before = shard_of(folder).read_bytes()
    assert pruned(folder) == 0
    assert shard_of(folder).read_bytes() == before


def test_what_a_change_left_behind_is_dropped(filled, tmp_path):
    """One picture and one caption change: one entry of each is no longer needed, and the new ones are kept."""
    from PIL import Image

    folder = filled()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a" / "img1.png")
    (tmp_path / "a" / "img2.txt").write_text("another")
    filled()
    assert counted(folder) == {LATENTS: 5, TEXT: 5, HASHES: 5}
    assert pruned(folder) > 0
    assert counted(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4}
    store = DiskStore(folder)
    cache = TensorCache(store)
    assert cache.get(NAMES.key("another"))["hidden"].tolist() == [7.0] * 3
    assert cache.get(NAMES.key("tag2, cat, a")) is None
    store.close()
    filled()
    assert counted(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4}  # nothing needed was missing


def test_another_dataset_and_another_encoder_keep_theirs(filled, pictures, tmp_path):
    folder = filled()
    pictures(tmp_path / "b", 3, seed=1)
    filled(subset="b")
    filled(encoder="another")
    assert counted(folder) == {LATENTS: 11, TEXT: 7, HASHES: 7}
    assert pruned(folder) == 0
    shutil.rmtree(tmp_path / "b")
    assert pruned(folder) > 0
    assert counted(folder) == {LATENTS: 8, TEXT: 4, HASHES: 4}


def test_what_was_not_used_for_long_is_dropped_if_asked(filled):
    folder = filled()
    filled(encoder="another")
    for known in known_uses(folder):
        if known.use.encoder == "vae":
            os.utime(known.path, (time.time() - 40 * 86400,) * 2)
    assert pruned(folder, unused_days=50) == 0
    assert pruned(folder, unused_days=30) > 0
    assert counted(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4}


def test_records_that_are_there_twice_are_kept_once(filled):
    folder = filled()
    copy = folder / "shards" / "copy.shard"
    copy.write_bytes(shard_of(folder).read_bytes())
    assert counted(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4, AGAIN: 12}
    pruned(folder)
    assert counted(folder) == {LATENTS: 4, TEXT: 4, HASHES: 4}


def test_a_cache_in_use_is_left_alone(filled):
    folder = filled()
    other = DiskStore(folder)
    before = shard_of(folder).read_bytes()
    store = DiskStore(folder)
    with pytest.raises(UserError, match="is in use by another program"):
        prune(store, list(survey(store, read=True)), lambda record: False)
    assert shard_of(folder).read_bytes() == before
    other.close()
    prune(store, list(survey(store, read=True)), lambda record: False)
    assert not list((folder / "shards").iterdir())


def test_a_full_disk_while_pruning_loses_nothing(filled, monkeypatch):
    folder = filled()
    before = shard_of(folder).read_bytes()
    real, written = os.write, []

    def write(descriptor, data):
        written.append(len(data))
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(store_module.os, "write", write)
    store = DiskStore(folder)
    with pytest.raises(UserError, match="No space left on device"):
        prune(store, list(survey(store, read=True)), lambda record: record.kind == LATENTS)
    monkeypatch.undo()
    store.close()
    assert shard_of(folder).read_bytes() == before


def test_a_kill_while_pruning_loses_nothing(filled, monkeypatch):
    """At every moment what is needed lies whole in some shard."""
    folder = filled()
    states = []
    real = upkeep.Writer.append

    def append(self, key, content):
        states.append(counted_by_copy(folder))
        return real(self, key, content)

    def counted_by_copy(folder: Path) -> int:
        copy = folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "shards", copy / "shards")
        return counted(copy)[LATENTS]

    monkeypatch.setattr(upkeep.Writer, "append", append)
    store = DiskStore(folder)
    prune(store, list(survey(store, read=True)), lambda record: record.kind == LATENTS)
    store.close()
    assert states == [4] * 4
    assert counted(folder) == {LATENTS: 4}


def test_a_torn_use_is_passed_over(tmp_path):
    use = Use(cache=tmp_path, kind="latents", places=("x",), encoder="vae")
    remember(use, [key_of("a"), key_of("b")])
    (known,) = known_uses(tmp_path)
    assert known.use == use
    assert known.keys == {key_of("a"), key_of("b")}
    use.path.write_bytes(use.path.read_bytes()[:-3])
    assert known_uses(tmp_path) == []
    assert still_current([known]) == []  # its folder is not there
