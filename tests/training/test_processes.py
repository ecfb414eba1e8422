"""Training seen from outside: several processes, Ctrl-C, and a kill at any moment."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from sfumato.demo.toy import write_toy
from sfumato.formats.state import find_newest_state, load_state
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy
from training.stop_moments import start_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "launchers" / "train_network.py")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return write_toy("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.full
def test_two_processes_train_what_one_does(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """The same global batch; fillers where a batch does not divide; only the first process writes.

    A large eps keeps AdamW from blowing up rounding in gradients that are almost zero.
    """
    options = {"max_train_steps": 6, "optimizer_args": "eps=0.01"}
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=2, **options)
    command = make_arguments(toy, images, tmp_path / "both", train_batch_size=1, ddp_timeout=4, **options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    subprocess.run([*launcher, SCRIPT[1], *command], check=True, timeout=300)
    ours, theirs = read_weights(tmp_path / "both"), read_weights(alone)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    pairs = zip(read_metrics(alone), read_metrics(tmp_path / "both"), strict=True)
    assert all(abs(one["loss/current"] - two["loss/current"]) < 1e-4 for one, two in pairs)


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*SCRIPT, *command], stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the file is there and has a line."""
    for _ in range(2400):
        if path.is_file() and path.read_bytes().count(b"\n"):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.full
def test_ctrl_c_saves_a_state_that_goes_on_exactly(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """First Ctrl-C: the step is finished, the state saved, the command told, exit code 0."""
    output, steps = tmp_path / "out", 400
    command = make_arguments(toy, images, output, max_train_steps=steps, console_log_level="INFO")
    process = start(command)
    wait_for(output / "lora.run.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    folder = re.findall(r"--resume (\S+)", told)[-1]
    done = load_state(Path(folder))[0]["counters"]["step"]
    assert 0 < done < steps
    assert len(read_metrics(output)) == done
    total = done + 2
    straight = train_toy(toy, images, tmp_path / "straight", max_train_steps=total)
    train_toy(toy, images, output, max_train_steps=total, resume=folder)
    assert equal_tensors(read_weights(straight), read_weights(output))
    assert read_metrics(straight) == read_metrics(output)


@pytest.mark.full
def test_a_kill_at_any_moment_leaves_a_state_to_resume(toy: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """SIGKILL at 12 random moments while every step is saved; each time the newest complete state goes on."""
    output = tmp_path / "out"
    command = make_arguments(toy, images, output, max_train_steps=100_000, save_every_n_steps=1, save_state=True)
    command += ["--save_last_n_steps", "3", "--network_train_unet_only"]
    resume: list[str] = []
    reached = 0
    moments = random.Random(0)
    for number in range(12):
        (output / "lora.run.jsonl").unlink(missing_ok=True)
        logs = tmp_path / f"logs{number}"
        (pid,) = start_ranks(["train_network", *command, *resume], logs, count=1, counts_calls=False)
        wait_for_lines(output / "lora.run.jsonl", moments.randint(2, 5), logs / "rank0.log", pid)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        state, _ = load_state(find_newest_state(output))
        assert state["counters"]["step"] > reached  # a line is written after the saves of the step before
        reached = state["counters"]["step"]
        resume = ["--resume", str(output)]


def wait_for_lines(path: Path, lines: int, log: Path, pid: int) -> None:
    """Until the file has as many lines, or the process has ended."""
    for _ in range(2400):
        if path.is_file() and path.read_bytes().count(b"\n") >= lines:
            return
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")
