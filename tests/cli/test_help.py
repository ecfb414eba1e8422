"""The help texts: every option once, with its default, in lines that fit the terminal."""

from __future__ import annotations

import re

import pytest

from sfumato.cli.ema import EmaFileOptions
from sfumato.cli.generate import ALIASES, HIGHLIGHTS
from sfumato.cli.generate_options import GenerateOptions
from sfumato.cli.help import command_help, training_help
from sfumato.config.schema import vocabulary


@pytest.mark.parametrize("columns", [60, 200])
def test_every_option_stands_once_in_its_place(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = training_help("sfumato train", "Trains.")
    assert re.findall(r"^  --(\w+)", text, flags=re.MULTILINE) == list(vocabulary())


def test_defaults_and_choices(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = training_help("sfumato train", "Trains.")
    assert "--max_train_steps N             optimizer steps [default: 1600]" in text
    assert "--learning_rate X               " in text
    assert "[default: 2e-06]" in text
    assert "--loss_type l1|l2|huber|smooth_l1\n" in text
    words = " ".join(text.split())
    assert "one for each [default: 1]" in words
    assert 'separator of the tags of a caption [default: ","]' in words


def test_options_that_a_script_does_not_have_are_skipped():
    text = training_help("x.py", "Trains.", absent={"seed", "clip_l"})
    assert "--seed " not in text
    assert "--clip_l," not in text


def test_lines_fit_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = training_help("sfumato train", "Trains.") + command_help("sfumato generate", GenerateOptions)
    assert not [line for line in text.splitlines() if len(line) > 80]
    assert "|dpmsolver|\n      dpmsolver++|" in text  # many choices go on in the next line


def test_a_command_shows_its_arguments_and_its_own_options():
    text = command_help("sfumato ema", EmaFileOptions)
    assert text.startswith("usage: sfumato ema SAVED ... --sigma_rel X [--option value ...]\n")
    assert re.findall(r"^  (\S+)", text, flags=re.MULTILINE) == ["SAVED", "--sigma_rel", "--name", "--output"]
    assert "--seed" not in text


def test_highlights_name_other_spellings():
    text = command_help("sfumato generate", GenerateOptions, highlights=HIGHLIGHTS, aliases=ALIASES)
    entries = re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)
    assert entries == [*GenerateOptions.model_fields, *HIGHLIGHTS]
    assert all(f"(also --{alias})" in " ".join(text.split()) for alias, name in ALIASES.items() if name in HIGHLIGHTS)
