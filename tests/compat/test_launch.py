"""The launchers: scripts run by their names, with their own options, from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compat.helpers import ROOT
from sfumato.compat.launch import launch, main
from sfumato.compat.scripts import SCRIPTS


def test_options_of_other_scripts_are_refused_with_their_home(capsys, codes):
    assert main(["train_network", "--clip_l", "x", "--family", "y", "--clip_lx", "z"]) == 2
    printed = capsys.readouterr().err
    assert "train_network does not have it; it belongs to flux_train_network" in printed
    assert "--family is not an option here — the script's name says it" in printed
    assert "did you mean --clip_l?" in printed
    assert codes.count("option-of-another-script") == 2


def test_a_script_runs_with_its_family(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("sfumato.train.train", made.append)
    words = f"--pretrained_model_name_or_path a/b --train_data_dir {tmp_path} --output_dir o --resolution 64 --seed 4"
    assert main(["train_network", *words.split()]) == 0
    (config,) = made
    assert (config.loop.seed, config.run.family, config.run.method) == (4, "sd", "adapter")
    assert config.source("family") == "launcher"


def test_help_shows_only_what_the_script_has(capsys):
    assert main(["train_network", "--help"]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: train_network.py" in printed
    assert "--clip_l" not in printed
    assert all(f"  {name}\n" in printed for name in SCRIPTS)


@pytest.mark.parametrize("argv", [["--seed", "3"], ["nonsense"]])
def test_without_a_script(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_worker_that_imports_a_launcher_starts_nothing():
    launch("__mp_main__", "train_network")


def run_launcher(*words: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Neither installed nor on the path: only the launcher knows where the package is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(words, env=environment, cwd=where, capture_output=True, text=True)


def test_a_launcher_runs_from_anywhere(tmp_path):
    launcher = str(ROOT / "launchers" / "train_network.py")
    done = run_launcher(sys.executable, launcher, "--help", where=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_launcher(sys.executable, "train_network.py", "--sed", "1", where=ROOT / "launchers")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: 4 problems")


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"],
        ["torch.distributed.run", "--nproc_per_node", "2"],
    ],
)
def test_a_launcher_runs_under_the_tools_that_start_processes(words, tmp_path):
    launcher = str(ROOT / "launchers" / "train_network.py")
    done = run_launcher(sys.executable, "-m", *words, launcher, "--help", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: train_network.py" in done.stdout
