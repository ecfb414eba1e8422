"""The help text holds the whole vocabulary."""

from __future__ import annotations

import re

import pytest

from sfumato.cli.help import help_text
from sfumato.config.schema import vocabulary


@pytest.mark.parametrize("columns", [60, 200])
def test_every_option_stands_once_in_its_place(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    now, later = help_text("sfumato train", "Trains.").split("Known, but not available yet:")
    entries = re.findall(r"^  --(\w+)", now, flags=re.MULTILINE)
    assert entries == [name for name, option in vocabulary().items() if not option.facts.planned]
    planned = [name for name, option in vocabulary().items() if option.facts.planned]
    assert all(f"--{name}" in later for name in planned)


def test_defaults_and_choices(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = help_text("sfumato train", "Trains.")
    assert "--max_train_steps N             optimizer steps [default: 1600]" in text
    assert "--learning_rate X               " in text
    assert "[default: 2e-06]" in text
    assert "--loss_type l1|l2|huber|smooth_l1\n" in text


def test_options_that_a_script_does_not_have_are_left_out():
    text = help_text("x.py", "Trains.", without={"seed", "clip_l"})
    assert "--seed " not in text
    assert "--clip_l," not in text


def test_lines_fit_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    long = [line for line in help_text("sfumato train", "Trains.").splitlines() if len(line) > 100]
    assert all(" " not in line.strip().removeprefix("--").partition(" ")[2] for line in long), long
