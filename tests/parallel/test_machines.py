"""The launcher script for several machines: two of them here, two processes each, train what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfumato.demo.toy import write_toy
from toy_runs import make_arguments, make_images, read_metrics, read_weights, train_toy

ROOT = Path(__file__).parents[2]
MACHINES = ROOT / "examples" / "machines"


def test_the_scripts_are_shell_scripts() -> None:
    for shell, name in (("sh", "launch.sh"), ("bash", "train.slurm")):
        subprocess.run([shell, "-n", MACHINES / name], check=True)


def test_what_is_missing_is_said() -> None:
    names = ("MACHINES", "SLURM_NNODES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(["sh", MACHINES / "launch.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MACHINES=2" in done.stderr


@pytest.mark.full
def test_two_machines_of_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """One trains a batch of four, the others one of one each; a large eps for gradients that are almost zero."""
    toy, images = write_toy("sd", tmp_path / "toy"), make_images(tmp_path / "images", 8)
    options = {"max_train_steps": 3, "optimizer_args": "eps=0.01", "network_train_unet_only": True}
    alone = train_toy(toy, images, tmp_path / "alone", train_batch_size=4, **options)
    words = make_arguments(toy, images, tmp_path / "all", train_batch_size=1, ddp_timeout=4, **options)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    common = {**os.environ, "PATH": path, "MACHINES": "2", "FIRST": "127.0.0.1", "PROCESSES": "2", "PORT": "29657"}
    machines = [
        subprocess.Popen(
            ["sh", MACHINES / "launch.sh", "train", *words],
            env={**common, "MACHINE": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for machine in machines:
        told = machine.communicate(timeout=300)[1]
        assert machine.returncode == 0, told
    ours, theirs = read_weights(tmp_path / "all"), read_weights(alone)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    pairs = zip(read_metrics(alone), read_metrics(tmp_path / "all"), strict=True)
    assert all(abs(one["loss/current"] - other["loss/current"]) < 1e-4 for one, other in pairs)
