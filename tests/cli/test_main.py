"""The command `sfumato`: what it calls, its exit codes, and its last line."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfumato.cli.main import main
from sfumato.errors import InternalError, UserError

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def argv(tmp_path) -> list[str]:
    """A complete command line."""
    return [
        "--pretrained_model_name_or_path", "owner/model", "--train_data_dir", str(tmp_path), "--output_dir", "out",
        "--resolution", "64",
    ]  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """What the commands call, replaced by something that writes down its arguments."""
    importlib.import_module("sfumato.tools.rehearse")  # of which the module that is replaced here is a part

    made = []

    def module(name: str, **functions):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))

    def train(config):
        made.append(("train", config))

    def plan(config):
        made.append(("plan", config))

    def tool(argv):
        made.append(("tool", list(argv)))
        return 3

    module("sfumato.train", train=train)
    module("sfumato.tools.plan", show_plan=plan)
    module("sfumato.cli.toy", main=tool)
    module("sfumato.cli.demo", main=tool)
    return made


def test_train_and_plan_get_the_config(argv, calls):
    assert main(["train", *argv, "--family", "some", "--seed", "3"]) == 0
    assert main(["plan", *argv]) == 0
    (_, config), (_, without) = calls
    assert (config.loop.seed, config.run.family, config.run.method) == (3, "some", "adapter")
    assert without.run.family is None


def test_toy_and_demo_get_their_own_words_and_give_the_exit_code(calls):
    assert main(["toy", "a", "--b"]) == 3
    assert main(["demo", "--c"]) == 3
    assert calls == [("tool", ["a", "--b"]), ("tool", ["--c"])]


def test_output_config_writes_and_stops(argv, calls, tmp_path, capsys):
    assert main(["train", *argv, "--output_config", "--config_file", str(tmp_path / "new.toml")]) == 0
    assert (tmp_path / "new.toml").is_file()
    assert not calls
    assert "new.toml" in capsys.readouterr().out


def test_one_fault(argv, calls, capsys):
    assert main(["train", *argv, "--sed", "3"]) == 2
    assert capsys.readouterr().err == "error: --sed is not an option — did you mean --seed?\n"
    assert not calls


def test_several_faults_stand_one_a_line_and_the_last_line_counts_them(argv, capsys):
    assert main(["train", *argv, "--sed", "3", "--network_dim", "x", "--seed", "y"]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert not printed.out
    assert [line[:2] for line in lines] == ["- ", "- ", "- ", "er"]
    assert lines[-1] == "error: 3 problems, listed above; the first: --sed is not an option — did you mean --seed?"


def test_a_fault_of_the_run_is_one_line(argv, calls, monkeypatch, capsys):
    def fails(config):
        raise UserError("the file\nis broken", code="file-broken", fix="replace it")

    monkeypatch.setattr(sys.modules["sfumato.train"], "train", fails)
    assert main(["train", *argv]) == 2
    assert capsys.readouterr().err == "error: the file is broken — replace it\n"


@pytest.mark.parametrize("where", ["command line", "file"])
def test_debug_shows_the_traceback_above_the_last_line(argv, calls, monkeypatch, capsys, tmp_path, where):
    def fails(config):
        raise UserError("no", code="some-fault")

    monkeypatch.setattr(sys.modules["sfumato.train"], "train", fails)
    (tmp_path / "run.toml").write_text("debug = true")
    more = ["--debug"] if where == "command line" else ["--config_file", str(tmp_path / "run.toml")]
    assert main(["train", *argv, *more]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: no"


def test_ctrl_c(argv, calls, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["sfumato.train"], "train", interrupted)
    assert main(["train", *argv]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"


def test_an_internal_error_shows_its_traceback_and_asks_for_a_report(argv, calls, monkeypatch, capsys):
    def fails(config):
        raise InternalError("no rule for\nthe key x")

    monkeypatch.setattr(sys.modules["sfumato.train"], "train", fails)
    assert main(["train", *argv]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: internal error, please report it: no rule for the key x"


def test_a_fault_of_ours_is_not_hidden(argv, calls, monkeypatch):
    def broken(config):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["sfumato.train"], "train", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", *argv])


@pytest.mark.parametrize("command", ["trian", "--seed"])
def test_an_unknown_command(command, capsys):
    assert main([command]) == 2
    assert capsys.readouterr().err.startswith(f"error: sfumato has no command '{command}'")


def test_overview_and_version(capsys):
    assert main([]) == main(["--help"]) == main(["-h"]) == main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert "  train " in printed
    assert printed.splitlines()[-1].startswith("sfumato 0.")


def run_python(*words: str, **more) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, **more)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"], ["plan", "--help"], ["train", "--x"]])
def test_what_must_be_fast_imports_nothing_heavy(argv):
    program = (
        f"import sys; from sfumato.cli.main import main; main({argv!r})\n"
        "sys.exit(str(sorted({'torch', 'diffusers', 'transformers', 'accelerate', 'numpy', 'PIL'} & set(sys.modules))))"
    )
    assert run_python("-c", program).stderr.splitlines()[-1] == "[]"


def test_the_package_runs_as_a_module():
    done = run_python("-m", "sfumato", "train", "--seed", "x")
    assert done.returncode == 2
    assert "--seed: 'x' is not a whole number" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_fault():
    with subprocess.Popen(
        [sys.executable, "-m", "sfumato", "train", "--help"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
