"""Scripts run in processes of their own that need not import torch and the libraries anew: 4 s of each, otherwise."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 300.0  # seconds until a test counts as hanging


@cache
def start_server() -> subprocess.Popen[str]:
    """It ends with this process, whose end closes its input."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def run_ranks(script: Path, *words: str, processes: int = 2) -> None:
    """Run a script in so many processes that find each other as those of torchrun do; each must end well.

    torchrun itself is tests/training/test_processes.py's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    codes, output = run_script(script, words, folder=Path.cwd(), environments=ranks)
    assert codes == [0] * processes, output


def run_script(
    script: Path, words: Sequence[str], *, folder: Path, environments: Sequence[dict[str, str]] = ({},)
) -> tuple[list[int], str]:
    """Run a script once for each environment, all at once; gives the exit codes, and what all wrote.

    environments: what each has beside this process's own variables.
    """
    server = start_server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as shown:
        whole = [{**os.environ, **environment} for environment in environments]
        request = {"words": [str(script), *words], "folder": str(folder), "output": shown.name, "environments": whole}
        server.stdin.write(json.dumps(request) + "\n")
        if not select.select([server.stdout], [], [], TIMEOUT)[0]:
            server.kill()
            start_server.cache_clear()
            raise AssertionError(f"{script} did not end:\n{shown.read()}")
        return json.loads(server.stdout.readline()), shown.read()
