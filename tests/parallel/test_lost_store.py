"""What is printed where the process that holds the store is killed."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import os, signal
    from sfumato.common.quiet_imports import silence_lost_stores
    if {silenced}:
        silence_lost_stores()
    from datetime import timedelta
    from torch.distributed import TCPStore

    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=20), wait_for_workers=False)
        os.write(sender, str(store.port).encode())
        signal.pause()
    store = TCPStore("127.0.0.1", int(os.read(receiver, 10)), 2, False, timedelta(seconds=20))
    store.set("a", "b")
    os.kill(pid, signal.SIGKILL)
    try:
        while True:
            store.check(["a"])
    except RuntimeError:
        os.waitpid(pid, 0)
"""


@pytest.mark.full
@pytest.mark.parametrize("silenced", [True, False])
def test_torch_prints_no_stack_frames(silenced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    script = textwrap.dedent(SCRIPT).format(silenced=silenced)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ("frame #" in done.stderr) != silenced
