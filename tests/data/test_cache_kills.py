"""Filling a cache while things go wrong from outside: kills at any moment, and a disk that is full."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfumato.data.cache import LATENTS, ContentHashes, Filling, LatentNames, TensorCache, fill_latents, latent_places
from sfumato.data.plans import DataPlan
from sfumato.data.store import DiskStore
from sfumato.data.upkeep import DAMAGED, survey
from sfumato.errors import UserError

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no fork"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # fork with threads; none of ours is running
]


def encode(pixels, seeds):
    time.sleep(0.01)
    noise = [torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.nn.functional.avg_pool2d(pixels, 8) + torch.stack(noise)[:, None]


def fill(folder: Path, plan: DataPlan, rank: int) -> dict[str, torch.Tensor]:
    store = DiskStore(folder)
    names = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    places, how = latent_places(plan), Filling(rank=rank, processes=2)
    fill_latents(TensorCache(store), names, places, encode, batch_size=2, workers=1, how=how)
    found = {str(place): TensorCache(store).get(names.key(place))[LATENTS] for place in places}
    store.close()
    return found


def forked(work: Callable[[], object]) -> int:
    """Do it in a process of its own, which has nothing to import any more; gives the process's id."""
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = bool(work())
        finally:
            os._exit(0 if good else 1)
    return child


def both(folder: Path, plan: DataPlan) -> list[int]:
    """Two processes that fill the folder together."""
    return [forked(lambda rank=rank: fill(folder, plan, rank)) for rank in (0, 1)]


@pytest.mark.slow
def test_kills_while_two_processes_fill(find, pictures, tmp_path):
    """Thirty times both are killed at a random moment; what is there is right, and a last pass makes the rest."""
    pictures(tmp_path / "t" / "1_a", 40)
    plan = find("--train_data_dir", tmp_path / "t", "--resolution", 64, "--flip_aug")
    right = expected(plan)
    moments, killed, partly = random.Random(0), 0, 0
    for moment in range(30):
        folder = tmp_path / f"cache{moment // 3}"
        children = both(folder, plan)
        time.sleep(moments.uniform(0.02, 0.3))
        for child in children:
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        store = DiskStore(folder)
        cache = TensorCache(store)
        names = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
        entries = {str(place): cache.get(names.key(place)) for place in latent_places(plan)}
        assert all(entry is None or torch.equal(entry[LATENTS], right[name]) for name, entry in entries.items())
        assert not [record for record in survey(store, read=True) if record.kind == DAMAGED]
        partly += 0 < sum(entry is None for entry in entries.values()) < len(entries)
        store.close()
    assert killed >= 40
    assert partly >= 10
    for folder in sorted(tmp_path.glob("cache?")):
        assert [os.waitpid(child, 0)[1] for child in both(folder, plan)] == [0, 0]
        found = fill(folder, plan, rank=0)
        assert all(torch.equal(found[name], right[name]) for name in right)


def expected(plan: DataPlan) -> dict[str, torch.Tensor]:
    """What each entry must be, without any store on disk."""
    from sfumato.data.cache import seed_of_entry, to_tensor
    from sfumato.data.store import MemoryStore

    names = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))
    return {
        str(place): encode(to_tensor([place.pixels()]), [seed_of_entry(names.key(place))])[0]
        for place in latent_places(plan)
    }


def test_a_disk_that_is_full_is_one_clear_line_and_leaves_whole_entries(find, pictures, tmp_path, capfd):
    """The system itself cuts a write in the middle: no file of the process may grow beyond 12 kB."""
    import resource

    pictures(tmp_path / "t" / "1_a", 40)
    plan = find("--train_data_dir", tmp_path / "t", "--resolution", 64)
    DiskStore(tmp_path / "cache").close()

    def limited() -> bool:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        try:
            fill(tmp_path / "cache", plan, rank=0)
        except UserError as error:
            os.write(1, str(error).encode())
            return True
        return False

    assert os.WEXITSTATUS(os.waitpid(forked(limited), 0)[1]) == 0
    assert "cannot write into the cache (File too large) — free disk space" in capfd.readouterr().out
    store = DiskStore(tmp_path / "cache")
    kinds = [record.kind for record in survey(store, read=True)]
    assert LATENTS in kinds
    assert set(kinds) <= {LATENTS, "content hashes"}
    names = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    right = expected(plan)
    entries = {str(place): TensorCache(store).get(names.key(place)) for place in latent_places(plan)}
    assert any(entry is None for entry in entries.values())
    assert all(entry is None or torch.equal(entry[LATENTS], right[name]) for name, entry in entries.items())
