"""Output in encodings that lack letters, and what is no file in place of files: lines, never a traceback or a wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli.exits import run_guarded
from sfumato.cli.main import COMMANDS, Command, main
from sfumato.compat.launch import main as launch_script
from sfumato.errors import UserError

ROOT = Path(__file__).parents[2]
ENCODINGS = ("ascii", "cp1252", "cp932")
LETTERS = "赤い箱 größe 🎨 \udcff"  # the last one: a byte of a file name that is not UTF-8


def capture(encoding: str, run: Callable[[], int]) -> tuple[int, bytes]:
    """The exit code and the output of a function, as in a process that writes into a pipe."""
    content = BytesIO()
    stream = TextIOWrapper(content, encoding, write_through=True)
    with redirect_stdout(stream), redirect_stderr(stream):
        return run(), content.getvalue()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_letter_is_written_somehow(encoding):
    def fail() -> int:
        print(LETTERS)
        raise UserError(LETTERS, code="some-fault")

    code, output = capture(encoding, lambda: run_guarded(fail, debug=True))
    assert code == 2
    assert output.count(b"\\udcff") >= 2
    assert output.splitlines()[-1].startswith(b"error: ")


def test_what_was_asked_for_is_kept():
    stream = TextIOWrapper(BytesIO(), "ascii", errors="ignore")
    with redirect_stdout(stream):
        assert run_guarded(lambda: None, debug=False) == 0
    assert stream.errors == "ignore"


def list_commands() -> list[list[str]]:
    words: list[list[str]] = []
    for name, command in COMMANDS.items():
        inner = [[name]] if isinstance(command, Command) else [[name, each] for each in command.commands]
        words += inner
    return words


@pytest.mark.parametrize("words", list_commands(), ids=" ".join)
@pytest.mark.parametrize(("rest", "code"), [(["--help"], 0), (["--箱🎨", "größe"], 2)], ids=["help", "fault"])
def test_every_command(words, rest, code):
    for encoding in ENCODINGS:
        ended, output = capture(encoding, lambda: main([*words, *rest]))
        assert ended == code
        assert output


@pytest.mark.parametrize(("rest", "code"), [(["--help"], 0), (["--箱🎨", "größe"], 2)], ids=["help", "fault"])
def test_a_script_of_sd_scripts(rest, code):
    ended, output = capture("ascii", lambda: launch_script(["train_network", *rest]))
    assert ended == code
    assert output


@pytest.mark.full
@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp932", marks=pytest.mark.full)])
def test_a_dataset_with_many_letters_is_inspected(tmp_path, encoding):
    folder = tmp_path / "1_写真"
    folder.mkdir()
    Image.new("RGB", (80, 64)).save(folder / "箱🎨.png")
    (folder / "箱🎨.txt").write_text("赤い箱, größe 🎨", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "sfumato", "dataset", "inspect", str(folder), "--resolution", "64"]
    done = subprocess.run([*words, "--cache_dir", str(tmp_path / "cache")], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"tags" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="such files do not exist there")
@pytest.mark.parametrize(
    "option",
    [
        "--pretrained_model_name_or_path", "--vae", "--network_weights", "--sample_prompts", "--config_file",
        "--dataset_config", "--in_json", "--log_tracker_config",
    ],
)  # fmt: skip
def test_a_named_pipe_in_place_of_a_file_is_named(option, tmp_path, capsys):
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    words = [
        "--pretrained_model_name_or_path",
        "owner/model",
        "--output_dir",
        str(tmp_path / "out"),
        "--resolution",
        "64",
    ]
    assert main(["train", *words, option, str(pipe)]) == 2
    assert f"{pipe} is a named pipe" in capsys.readouterr().err
