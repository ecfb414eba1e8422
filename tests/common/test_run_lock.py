"""One run per name, and what killed writers leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato.common import files
from sfumato.common.files import DiskNeed
from sfumato.common.run_lock import RunLock
from sfumato.common.text import format_bytes
from sfumato.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from sfumato.common.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), "run")
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


def hold_elsewhere(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    held = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    return held


def test_a_second_run_of_the_name_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with hold_elsewhere(tmp_path / "out") as held:
        with pytest.raises(UserError, match=rf"\.run\.lock.*{held.pid}") as caught:
            RunLock(tmp_path / "out", "run")
        assert caught.value.code == "run-name-in-use"
        with RunLock(tmp_path / "out", "other"):
            pass
        held.communicate("")
    assert not (tmp_path / "out").exists(), "the lock is removed, and the folder that it has made"
    with RunLock(tmp_path, "run") as lock:
        assert lock.path.read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    with hold_elsewhere(tmp_path) as held:
        held.kill()
    assert (tmp_path / ".run.lock").exists()
    with RunLock(tmp_path, "run"):
        pass
    assert not (tmp_path / ".run.lock").exists()


def write_in_child(path: Path, *, then: signal.Signals | None) -> int:
    """A process that is killed, or goes on, in the middle of writing a file."""
    pid = os.fork()
    if pid == 0:
        with files.write_atomically(path) as temporary:
            temporary.write_bytes(b"x" * 1000)
            if then is not None:
                os.kill(os.getpid(), then)
            time.sleep(60)
        os._exit(0)
    while not any(each.stat().st_size for each in path.parent.glob(f".{path.name}.*.tmp")):
        time.sleep(0.01)
    if then is not None:
        os.waitpid(pid, 0)
    return pid


def test_the_next_write_removes_what_a_kill_has_left(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    write_in_child(path, then=signal.SIGKILL)
    needed = files.shutil.disk_usage(tmp_path).free + 400
    with pytest.raises(UserError) as caught:
        files.check_disk_space(tmp_path, [DiskNeed("saves", 1, needed + 10**12)], mine="run", fix="")
    assert caught.value.code == "disk-too-small"
    files.write_bytes(tmp_path / "run-step00000004.safetensors", b"another name")
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    files.write_bytes(path, b"whole")
    assert {each.name for each in tmp_path.iterdir()} == {"run.safetensors", "run-step00000004.safetensors"}


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    pid = write_in_child(path, then=None)
    try:
        files.write_bytes(path, b"whole")
        files.remove_leftovers(tmp_path, "run.*")
        assert len(list(tmp_path.glob(".run.safetensors.*.tmp"))) == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    files.remove_leftovers(tmp_path, "run.*")
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_count_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = files.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: usage)
    (tmp_path / ".run-state.0123abcd.tmp").mkdir()
    (tmp_path / ".run-state.0123abcd.tmp" / "state.safetensors").write_bytes(b"x" * 500_000)
    (tmp_path / ".other.safetensors.0123abcd.tmp").write_bytes(b"x" * 500_000)
    files.check_disk_space(tmp_path, [DiskNeed("saves", 1, 400_000)], mine="run", fix="")
    with pytest.raises(UserError, match=r"1 kB free, and 800 kB are needed: 2 saves of 400 kB"):
        files.check_disk_space(tmp_path, [DiskNeed("saves", 2, 400_000)], mine="run", fix="")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (34_123, "34.1 kB"), (999_999, "1 MB"), (6.94e9, "6.94 GB"),
     (2.5e16, "2.5e+04 TB")],
)  # fmt: skip
def test_sizes_are_readable(count: float, text: str) -> None:
    assert format_bytes(count) == text
