"""Records on disk: kills, damage, several processes, a lost or broken index."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sfumato.data.cache import store as store_module
from sfumato.data.cache.shards import HEADER_BYTES, ShardWriter
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.errors import UserError

SOURCE = Path(store_module.__file__).parents[3]  # what sfumato is imported from
RECORDS = 400


def key(i: int) -> bytes:
    return hashlib.blake2b(f"key {i}".encode(), digest_size=20).digest()


def content(i: int) -> bytes:
    """A few bytes to some tens of thousands, a function of i."""
    return random.Random(i).randbytes(random.Random(i).randrange(40_000))


def fill(folder: Path, numbers) -> None:
    store = DiskStore(folder)
    for i in numbers:
        store.put(key(i), content(i))
    store.close()


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "shards").iterdir())


@pytest.mark.parametrize("make", [lambda path: DiskStore(path), lambda path: MemoryStore()], ids=["disk", "memory"])
def test_what_is_put_is_got(tmp_path, make):
    store = make(tmp_path)
    store.put(key(1), content(1))
    store.put(key(2), b"")
    assert store.get(key(1)) == content(1)
    assert store.get(key(2)) == b""
    assert store.get(key(3)) is None
    assert store.find_missing([key(3), key(1), key(4)]) == [key(3), key(4)]
    store.close()


def test_it_is_there_again_after_opening(tmp_path):
    fill(tmp_path, range(20))
    store = DiskStore(tmp_path)
    assert all(store.get(key(i)) == content(i) for i in range(20))
    assert not store.find_missing([key(i) for i in range(20)])


def test_another_store_sees_it_after_a_look(tmp_path):
    one, two = DiskStore(tmp_path), DiskStore(tmp_path)
    one.put(key(1), content(1))
    assert two.get(key(1)) is None
    two.refresh()  # found in the shard itself: the writer has not updated the index yet
    assert two.get(key(1)) == content(1)
    one.put(key(2), content(2))
    one.flush()
    assert two.get(key(2)) == content(2)


@pytest.mark.parametrize("damage", ["lost", "text", "cut", "zeros", "empty", "schema"])
def test_the_index_is_made_anew(tmp_path, damage):
    fill(tmp_path, range(20))
    index = tmp_path / "index.sqlite"
    intact = index.read_bytes()
    new = {"text": b"not a database", "cut": intact[: len(intact) // 2], "zeros": bytes(len(intact)), "empty": b""}
    new["schema"] = intact.replace(b"CREATE TABLE", b"CREATE\x80TABLE")  # sqlite repeats it in its message
    if damage == "lost":
        index.unlink()
    else:
        index.write_bytes(new[damage])
    store = DiskStore(tmp_path)
    assert all(store.get(key(i)) == content(i) for i in range(20))


def test_an_index_that_breaks_while_open_is_replaced_by_one_in_memory(tmp_path, caplog):
    fill(tmp_path, range(20))
    store = DiskStore(tmp_path)
    store._index.close()
    assert all(store.get(key(i)) == content(i) for i in range(20))
    assert "reading the shards instead" in caplog.text


def test_a_wrong_index_gives_no_wrong_content(tmp_path, caplog):
    """A record at a wrong offset does not have the key."""
    fill(tmp_path, range(20))
    store = DiskStore(tmp_path)
    with store._index:
        store._index.execute("update records set place = place + 3 where key = ?", (key(7),))
        store._index.execute("update records set length = length + 1 where key = ?", (key(8),))
    assert store.get(key(7)) is None
    assert store.get(key(8)) is None
    assert store.get(key(9)) == content(9)
    assert caplog.text.count("is damaged") == 2


@pytest.mark.parametrize("where", ["header", "content"])
def test_a_flipped_bit_is_a_miss_and_one_warning(tmp_path, caplog, where):
    store = DiskStore(tmp_path)
    store.put(key(1), content(1))
    store.put(key(2), b"the one that is hit")
    store.put(key(3), content(3))
    store.close()
    (shard,) = shards(tmp_path)
    data = bytearray(shard.read_bytes())
    place = data.index(b"the one that is hit") + (4 if where == "content" else -HEADER_BYTES + 6)
    data[place] ^= 1
    shard.write_bytes(data)
    store = DiskStore(tmp_path)
    assert store.get(key(2)) is None
    assert store.get(key(2)) is None
    assert caplog.text.count("is damaged") == 1
    assert key(2).hex() in caplog.text
    assert store.find_missing([key(1), key(2), key(3)]) == [key(2)]
    store.put(key(2), b"made again")
    store.close()
    store = DiskStore(tmp_path)
    assert [store.get(key(i)) for i in (1, 2, 3)] == [content(1), b"made again", content(3)]


@pytest.mark.parametrize("kept", [0, 3, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5])
@pytest.mark.parametrize("known", [True, False], ids=["index knew", "index did not"])
def test_a_torn_end_is_a_miss_and_one_warning(tmp_path, caplog, kept, known):
    fill(tmp_path, range(5))
    (shard,) = shards(tmp_path)
    last = HEADER_BYTES + len(content(4))
    os.truncate(shard, shard.stat().st_size - last + kept)
    if not known:
        (tmp_path / "index.sqlite").unlink()
    store = DiskStore(tmp_path)
    assert store.get(key(4)) is None
    assert all(store.get(key(i)) == content(i) for i in range(4))
    assert len(caplog.records) == (1 if known or kept else 0)
    store.put(key(4), content(4))
    store.close()
    caplog.clear()
    assert DiskStore(tmp_path).get(key(4)) == content(4)
    assert not caplog.records  # reported once, not at every start


def test_a_deleted_shard_takes_its_records_along(tmp_path):
    fill(tmp_path, range(5))
    (first,) = shards(tmp_path)
    fill(tmp_path, range(5, 8))
    first.unlink()
    store = DiskStore(tmp_path)
    assert store.find_missing([key(i) for i in range(8)]) == [key(i) for i in range(5)]


def test_a_full_disk_is_an_error_and_leaves_intact_records(tmp_path, monkeypatch):
    store = DiskStore(tmp_path)
    store.put(key(1), content(1))
    real = os.write

    def write(descriptor, data):
        real(descriptor, bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "write", write)
    with pytest.raises(UserError, match="No space left on device"):
        store.put(key(2), content(2))
    monkeypatch.undo()
    store.put(key(3), content(3))
    store.close()
    again = DiskStore(tmp_path)
    assert [again.get(key(i)) for i in (1, 2, 3)] == [content(1), None, content(3)]


def test_a_large_shard_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 50_000)
    fill(tmp_path, range(20))
    assert len(shards(tmp_path)) > 2
    store = DiskStore(tmp_path)
    assert all(store.get(key(i)) == content(i) for i in range(20))


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache_dir"):
        DiskStore(tmp_path / "file" / "cache")


def test_threads_may_read_while_one_writes(tmp_path):
    store = DiskStore(tmp_path)
    wrong: list[int] = []
    done = threading.Event()

    def look():
        while not done.is_set():
            i = random.randrange(200)
            if store.get(key(i)) not in (None, content(i)):
                wrong.append(i)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(200):
        store.put(key(i), content(i))
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(store.get(key(i)) == content(i) for i in range(200))


def test_opening_writes_nothing_but_the_index(tmp_path):
    fill(tmp_path, range(3))
    before = {path: path.read_bytes() for path in shards(tmp_path)}
    DiskStore(tmp_path).close()
    assert {path: path.read_bytes() for path in shards(tmp_path)} == before


FILLER = """
import sys
from pathlib import Path
from tests_of_store import content, key, RECORDS
from sfumato.data.cache.store import DiskStore
store = DiskStore(Path(sys.argv[1]))
made, most = 0, int(sys.argv[3])
for i in sorted(range(RECORDS), key=lambda i: (i * 7919 + int(sys.argv[2])) % RECORDS):
    if store.find_missing([key(i)]):
        if made == most:
            sys.stdin.read()  # until it is killed
        store.put(key(i), content(i))
        made += 1
        print(made, flush=True)
    if i % 50 == 0:
        store.refresh()
store.close()
"""


def start(folder: Path, number: int, *, most: int) -> subprocess.Popen[str]:
    """A process that fills the store and waits when it has put `most` records.

    It imports this file's key and content by path.
    """
    loader = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tests_of_store", {str(Path(__file__))!r})
module = importlib.util.module_from_spec(spec); sys.modules["tests_of_store"] = module
spec.loader.exec_module(module)
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    arguments = [sys.executable, "-c", loader + FILLER, str(folder), str(number), str(most)]
    return subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_kills_leave_it_intact(tmp_path, caplog):
    """Two processes fill at once and are killed when each has put a number of records; what is there is right."""
    caplog.set_level(logging.WARNING)
    rng = random.Random(0)
    for _ in range(3):
        enough = [rng.randint(1, RECORDS // 8) for _ in range(2)]
        fillers = [start(tmp_path, number, most=more + 2) for number, more in zip((1, 200), enough, strict=True)]
        for filler, more in zip(fillers, enough, strict=True):
            assert filler.stdout is not None
            assert [int(filler.stdout.readline()) for _ in range(more)] == list(range(1, more + 1))
            filler.kill()
            assert filler.wait() == -signal.SIGKILL
        store = DiskStore(tmp_path)
        there = {i for i in range(RECORDS) if store.get(key(i)) is not None}
        assert all(store.get(key(i)) == content(i) for i in there)
        assert set(store.find_missing([key(i) for i in range(RECORDS)])) == {key(i) for i in range(RECORDS)} - set(
            map(key, there)
        )
        assert 0 < len(there) < RECORDS
        store.close()
    fillers = [start(tmp_path, number, most=RECORDS) for number in (3, 4)]
    assert [filler.communicate(timeout=100) and filler.returncode for filler in fillers] == [0, 0]
    store = DiskStore(tmp_path)
    assert all(store.get(key(i)) == content(i) for i in range(RECORDS))
    assert "is damaged" not in caplog.text  # a torn end is one thing, a damaged record would be another


def test_a_writer_is_not_shared_by_forking(tmp_path):
    (tmp_path / "shards").mkdir()
    writer = ShardWriter(tmp_path / "shards")
    writer._process += 1
    with pytest.raises(AssertionError, match="forking"):
        writer.append(key(1), b"")
