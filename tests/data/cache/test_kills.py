"""Filling a cache while things go wrong from outside: kills at any moment, and a disk that is full."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sfumato.config import load_config
from sfumato.data.cache import store as store_module
from sfumato.data.cache.entries import LATENTS, ContentHashes, LatentKeys, TensorCache, make_entry_seed, to_tensor
from sfumato.data.cache.filling import fill_latents, list_latent_items
from sfumato.data.cache.maintenance import DAMAGED, HASHES, TORN, read_records
from sfumato.data.cache.shards import MAGIC
from sfumato.data.cache.sharing import FillOptions, belongs_to_part
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.find.discover import find_data
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems, UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork")
SOURCE = Path(store_module.__file__).parents[3]  # what sfumato is imported from
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
MINUTE = 60.0  # seconds to wait for a process that goes on; it never takes as long


def encode(pixels, seeds):
    noise = [torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.nn.functional.avg_pool2d(pixels, 8) + torch.stack(noise)[:, None]


def make_plan(root: str | Path) -> DataPlan:
    needed = ["--pretrained_model_name_or_path", "a/b", "--output_dir", "out", "--resolution", "64", "--flip_aug"]
    options = ["--train_data_dir", f"{root}/t", "--cache_dir", f"{root}/index", "--caption_extension", ".txt"]
    problems = Problems()
    plan = find_data(load_config([*needed, *options]), bucket_step=64, problems=problems)
    problems.raise_all()
    return plan


def fill(folder: Path, plan: DataPlan, rank: int) -> dict[str, torch.Tensor]:
    store = DiskStore(folder)
    latent_keys = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    items, options = list_latent_items(plan), FillOptions(rank=rank, processes=2)
    fill_latents(TensorCache(store), latent_keys, items, encode, batch_size=2, workers=1, options=options)
    latents: dict[str, torch.Tensor] = {}
    for item in items:
        entry = TensorCache(store).get(latent_keys.make_key(item))
        assert entry is not None
        latents[str(item)] = entry[LATENTS]
    store.close()
    return latents


def work(root: str, folder: str, rank: str, *how: str) -> int:
    """What a process of its own does; the exit code. how: nothing, or which kind of trouble it will meet."""
    troubles = {"full": full_disk, "slow": in_pieces}
    if how:
        troubles[how[0]](*how[1:])
    try:
        fill(Path(folder), make_plan(root), int(rank))
    except UserError as error:
        Path(root, "message").write_text(str(error))
        return 3
    return 0


def full_disk(limit: str) -> None:
    """The system itself cuts a write in the middle: no file of this process may grow beyond so many bytes."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))


def in_pieces(news: str, last: str) -> None:
    """Write every record in two pieces, cut at a random position, as a system may do; report each in a file.

    After the last one the process only waits for its end. The index is updated after few records, i.e. often.
    """
    store_module.RECORDS_PER_COMMIT = 3
    write, cuts, done = os.write, random.Random(news), 0
    report = os.open(news, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def piece(descriptor: int, data: memoryview) -> int:
        nonlocal done
        if done == int(last):
            threading.Event().wait()
        begins = bytes(data[:4]) == MAGIC
        written = write(descriptor, data[: cuts.randrange(1, len(data))] if begins else data)
        done += 1
        write(report, b".")
        return written

    store_module.os.write = piece  # pyright: ignore[reportAttributeAccessIssue]


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

    def wait(self, child: int) -> int:
        """How a process ended, as the system tells it."""
        return self.ask("wait", child)

    def fill(self, root: Path, folder: Path, rank: int, *how: object) -> int:
        """Start one of two processes that fill the folder; its id."""
        return self.ask(root, folder, rank, *how)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(10)


def expected(plan: DataPlan) -> dict[str, torch.Tensor]:
    """What each entry must be, without any store on disk."""
    latent_keys = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))
    latents: dict[str, torch.Tensor] = {}
    for item in list_latent_items(plan):
        seed = make_entry_seed(latent_keys.make_key(item))
        latents[str(item)] = encode(to_tensor([item.read_pixels()]), [seed])[0]
    return latents


def entries(store: DiskStore, plan: DataPlan) -> dict[str, torch.Tensor | None]:
    latent_keys = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    found = {str(item): TensorCache(store).get(latent_keys.make_key(item)) for item in list_latent_items(plan)}
    return {name: entry[LATENTS] if entry else None for name, entry in found.items()}


def count_missing(store: DiskStore, plan: DataPlan, rank: int) -> int:
    """How many latents of the share of one of two processes are missing."""
    latent_keys = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    keys = [latent_keys.make_key(item) for item in list_latent_items(plan)]
    return sum(belongs_to_part(key[-4:], rank, 2) for key in store.find_missing(keys))


def torn_or_missing(folder: Path, plan: DataPlan, right: dict[str, torch.Tensor]) -> int:
    """Torn records, after a look whether every entry is right or not there."""
    store = DiskStore(folder)
    found = entries(store, plan)
    assert all(entry is None or torch.equal(entry, right[name]) for name, entry in found.items())
    kinds = [record.content_type for record in read_records(store, check=True)]
    store.close()
    assert DAMAGED not in kinds
    assert any(entry is None for entry in found.values())
    return kinds.count(TORN)


def after(news: Path, pieces: int) -> None:
    """Wait until so many pieces of records were written."""
    patience = time.monotonic() + MINUTE
    while pieces and (not news.exists() or news.stat().st_size < pieces):
        assert time.monotonic() < patience, f"{news.name} stands still"
        time.sleep(0.0005)


@pytest.mark.full
def test_kills_while_two_processes_fill(write_images, tmp_path, server):
    """Thirty times both are killed at a random moment; what is there is right, and a last pass makes the rest.

    A moment is a piece of a record, and a little later; no process can come to its end before, however fast it is.
    """
    write_images(tmp_path / "t" / "1_a", 30)
    plan = make_plan(tmp_path)
    right = expected(plan)
    moments, torn = random.Random(0), 0
    for moment in range(30):
        folder = tmp_path / f"cache{moment // 3}"
        store = DiskStore(folder)
        most = [2 * count_missing(store, plan, rank) - 1 for rank in (0, 1)]  # with this many its last record is torn
        store.close()
        pieces = [moments.randint(0, each) for each in most]
        news = [tmp_path / f"news{moment}-{rank}" for rank in (0, 1)]
        children = [
            server.fill(
                tmp_path, folder, rank, "slow", news[rank], min(pieces[rank] + moments.randint(0, 5), most[rank])
            )
            for rank in (0, 1)
        ]
        for rank in moments.sample((0, 1), 2):
            after(news[rank], pieces[rank])
            time.sleep(moments.uniform(0, 0.003))
            os.kill(children[rank], signal.SIGKILL)
        assert [os.WTERMSIG(server.wait(child)) for child in children] == [signal.SIGKILL] * 2
        torn += torn_or_missing(folder, plan, right)
    assert torn >= 10  # kills in the middle of a record, of sixty
    for folder in sorted(tmp_path.glob("cache*")):
        children = [server.fill(tmp_path, folder, rank) for rank in (0, 1)]
        assert [server.wait(child) for child in children] == [0, 0]
        found = fill(folder, plan, rank=0)
        assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.full
def test_a_disk_that_is_full_is_one_clear_line_and_leaves_whole_entries(write_images, tmp_path, server):
    write_images(tmp_path / "t" / "1_a", 40)
    plan = make_plan(tmp_path)
    DiskStore(tmp_path / "cache").close()
    child = server.fill(tmp_path, tmp_path / "cache", 0, "full", 12_000)
    assert os.WEXITSTATUS(server.wait(child)) == 3
    message = (tmp_path / "message").read_text()
    assert "File too large" in message
    assert "--cache_dir" in message
    assert "\n" not in message
    store = DiskStore(tmp_path / "cache")
    kinds = {record.content_type for record in read_records(store, check=True)}
    assert kinds == {LATENTS, HASHES}
    right, found = expected(plan), entries(store, plan)
    assert any(entry is None for entry in found.values())
    assert all(entry is None or torch.equal(entry, right[name]) for name, entry in found.items())
