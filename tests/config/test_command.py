"""Options of one command: positional arguments, required options, other spellings, and the vocabulary beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.config.base import Options, option
from sfumato.config.command import CommandLine, read_command, read_options
from sfumato.config.load import load_command_config
from sfumato.config.values import FilePath, FilePaths
from sfumato.errors import SeveralErrors, UserError

RULES = ("model-missing", "data-missing", "output-missing")


class ToolOptions(Options):
    """A tool."""

    source: FilePath = option(None, "the file to read", positional=True, required=True)
    others: FilePaths = option((), "further files", positional=True)
    width: int = option(None, "how wide", required=True, ge=1)
    network_weights: FilePaths = option((), "adapters; training has an option of this name for one file")
    quick: bool = option(False, "do less")


def read(text: str) -> CommandLine:
    return read_command(text.split(), ToolOptions, aliases={"W": "width", "noise": "seed"})


def codes_of(line: CommandLine) -> list[str]:
    return [fault.code for fault in line.problems.found]


@pytest.mark.parametrize("text", ["a b c --width 3 --quick", "--quick a --width=3 b c", "--width 3 a b --quick c"])
def test_positional_arguments_may_stand_anywhere(text):
    options = read_options(text.split(), ToolOptions)
    assert options == ToolOptions(
        source=Path("a"), others=(Path("b"), Path("c")), width=3, network_weights=(), quick=True
    )


def test_defaults_and_switches():
    options = read_options(["a", "--width", "3", "--no_quick"], ToolOptions)
    assert (options.others, options.quick, options.network_weights) == ((), False, ())


def test_own_options_and_those_of_training_are_kept_apart():
    line = read("a --W 3 --network_weights x y --noise 7 --cache_latents")
    line.raise_faults()
    assert line.options(ToolOptions).network_weights == (Path("x"), Path("y"))
    assert line.values == {"seed": 7, "cache_latents": True}
    config = load_command_config(line, skip_rules=RULES)
    assert (config.loop.seed, config.network.network_weights) == (7, None)
    assert config.source("seed") == "command line"
    assert config == load_command_config(line, skip_rules=RULES)  # as often as wanted


def test_all_faults_come_together(tmp_path):
    line = read("--widht 3 --network_weights --seed x --quick=1")
    assert codes_of(line) == ["option-unknown", "switch-with-value", "option-type-wrong", "argument-missing"]
    with pytest.raises(SeveralErrors) as raised:
        load_command_config(line)
    assert raised.value.codes == [*codes_of(line), "model-missing", "data-missing", "output-missing"]


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["a"], "option-missing", "--width N"),
        (["--width", "3"], "argument-missing", "SOURCE"),
        (["a", "--width", "0"], "option-out-of-range", "'0' is below 1"),
        (["a", "--width", "3", "--source", "b"], "option-unknown", "--source"),
        (["a", "--width", "3", "--seed", "1"], "option-unknown", "--seed"),
        (["", "--width", "3"], "option-value-malformed", "SOURCE"),
    ],
)
def test_one_fault(argv, code, text):
    with pytest.raises(UserError) as raised:
        read_options(argv, ToolOptions)
    assert raised.value.code == code
    assert text in str(raised.value)


def test_too_many_words():
    class OneFile(Options):
        file: FilePath = option(None, "the file", positional=True, required=True)

    with pytest.raises(UserError) as raised:
        read_options(["a", "b", "c"], OneFile)
    assert raised.value.code == "words-unexpected"
    assert "'b' 'c'" in str(raised.value)


def test_a_word_after_a_secret_is_no_argument():
    line = read("--width 3 --wandb_api_key x canary-3f9a")
    assert codes_of(line) == ["words-unexpected", "argument-missing"]
    assert "canary" not in " ".join(str(fault) for fault in line.problems.found)


def test_an_option_that_follows_from_another(tmp_path):
    line = read("a --width 3")
    line.set_option("train_data_dir", tmp_path / "no", place="DATA")
    with pytest.raises(UserError) as raised:
        load_command_config(line, skip_rules=RULES)
    assert str(raised.value).startswith("DATA: ")
    line = read(f"a --width 3 --train_data_dir {tmp_path}")
    line.set_option("train_data_dir", tmp_path / "no", place="DATA")
    config = load_command_config(line, skip_rules=RULES)
    assert config.dataset.train_data_dir == tmp_path
    assert "DATA is ignored" in config.notes[0]
