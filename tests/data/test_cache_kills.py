"""Filling a cache while things go wrong from outside: kills at any moment, and a disk that is full."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sfumato.config import load_config
from sfumato.data import store as store_module
from sfumato.data.cache import (
    LATENTS,
    ContentHashes,
    Filling,
    LatentNames,
    TensorCache,
    fill_latents,
    latent_places,
    seed_of_entry,
    to_tensor,
)
from sfumato.data.plans import DataPlan
from sfumato.data.store import DiskStore, MemoryStore
from sfumato.data.summary import find_data
from sfumato.data.upkeep import DAMAGED, HASHES, survey
from sfumato.errors import Problems, UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork")
SOURCE = Path(store_module.__file__).parents[2]
SERVER = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("kills", sys.argv[1])
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)
print("ready", flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "wait":
        print(os.waitpid(int(rest[0]), 0)[1], flush=True)
        continue
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = kills.work(word, *rest)
        finally:
            os._exit(code)
    print(child, flush=True)
"""


def encode(pixels, seeds):
    time.sleep(0.02)
    noise = [torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.nn.functional.avg_pool2d(pixels, 8) + torch.stack(noise)[:, None]


def plan_of(root: str | Path) -> DataPlan:
    needed = ["--pretrained_model_name_or_path", "a/b", "--output_dir", "out", "--resolution", "64", "--flip_aug"]
    options = ["--train_data_dir", f"{root}/t", "--cache_dir", f"{root}/index", "--caption_extension", ".txt"]
    problems = Problems()
    plan = find_data(load_config([*needed, *options]), bucket_step=64, problems=problems)
    problems.raise_all()
    return plan


def fill(folder: Path, plan: DataPlan, rank: int) -> dict[str, torch.Tensor]:
    store = DiskStore(folder)
    names = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    places, how = latent_places(plan), Filling(rank=rank, processes=2)
    fill_latents(TensorCache(store), names, places, encode, batch_size=2, workers=1, how=how)
    found = {str(place): TensorCache(store).get(names.key(place))[LATENTS] for place in places}
    store.close()
    return found


def work(root: str, folder: str, rank: str, limit: str = "") -> int:
    """What a process of its own does; the exit code. limit: bytes beyond which it may write into no file."""
    if limit:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        fill(Path(folder), plan_of(root), int(rank))
    except UserError as error:
        Path(root, "told").write_text(str(error))
        return 3
    return 0


class Server:
    """Starts processes that have nothing to import any more, from one without threads."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SERVER, __file__]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, *words: object) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def both(self, root: Path, folder: Path) -> list[int]:
        """Two processes that fill the folder together."""
        return [self.ask(root, folder, rank) for rank in (0, 1)]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(10)


def expected(plan: DataPlan) -> dict[str, torch.Tensor]:
    """What each entry must be, without any store on disk."""
    names = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))
    return {
        str(place): encode(to_tensor([place.pixels()]), [seed_of_entry(names.key(place))])[0]
        for place in latent_places(plan)
    }


def entries(store: DiskStore, plan: DataPlan) -> dict[str, torch.Tensor | None]:
    names = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    found = {str(place): TensorCache(store).get(names.key(place)) for place in latent_places(plan)}
    return {name: entry[LATENTS] if entry else None for name, entry in found.items()}


@pytest.mark.slow
def test_kills_while_two_processes_fill(pictures, tmp_path, server):
    """Thirty times both are killed at a random moment; what is there is right, and a last pass makes the rest."""
    pictures(tmp_path / "t" / "1_a", 40)
    plan = plan_of(tmp_path)
    right = expected(plan)
    moments, killed, partly = random.Random(0), 0, 0
    for moment in range(30):
        folder = tmp_path / f"cache{moment // 2}"
        children = server.both(tmp_path, folder)
        time.sleep(moments.uniform(0.02, 0.35))
        for child in children:
            os.kill(child, signal.SIGKILL)
        killed += sum(os.WIFSIGNALED(server.ask("wait", child)) for child in children)
        store = DiskStore(folder)
        found = entries(store, plan)
        assert all(entry is None or torch.equal(entry, right[name]) for name, entry in found.items())
        assert not [record for record in survey(store, read=True) if record.kind == DAMAGED]
        partly += 0 < sum(entry is None for entry in found.values()) < len(found)
        store.close()
    assert killed >= 40
    assert partly >= 5
    for folder in sorted(tmp_path.glob("cache*")):
        assert [server.ask("wait", child) for child in server.both(tmp_path, folder)] == [0, 0]
        found = fill(folder, plan, rank=0)
        assert all(torch.equal(found[name], right[name]) for name in right)


def test_a_disk_that_is_full_is_one_clear_line_and_leaves_whole_entries(pictures, tmp_path, server):
    """The system itself cuts a write in the middle: no file of the process may grow beyond 12 kB."""
    pictures(tmp_path / "t" / "1_a", 40)
    plan = plan_of(tmp_path)
    DiskStore(tmp_path / "cache").close()
    child = server.ask(tmp_path, tmp_path / "cache", 0, 12_000)
    assert os.WEXITSTATUS(server.ask("wait", child)) == 3
    told = (tmp_path / "told").read_text()
    assert "cannot write into the cache (File too large) — free disk space" in told
    assert "\n" not in told
    store = DiskStore(tmp_path / "cache")
    kinds = {record.kind for record in survey(store, read=True)}
    assert kinds == {LATENTS, HASHES}
    right, found = expected(plan), entries(store, plan)
    assert any(entry is None for entry in found.values())
    assert all(entry is None or torch.equal(entry, right[name]) for name, entry in found.items())
