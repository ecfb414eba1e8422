"""Typing errors: how many letters differ, and which names are other words."""

from __future__ import annotations

import random
import string

import pytest

from sfumato.common.registry import count_edits, find_misspelled
from sfumato.config.schema import vocabulary


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [
        ("", "", 0), ("", "abc", 3), ("abc", "abc", 0), ("abc", "abcd", 1), ("abc", "axc", 1), ("abc", "acb", 1),
        ("kitten", "sitting", 3), ("ca", "abc", 3), ("saturday", "sunday", 3), ("lr", "rl", 1),
    ],
)  # fmt: skip
def test_edits(first, second, edits):
    """Values from textbooks; "ca" to "abc" is 3 for the alignment that edits no letter twice."""
    assert count_edits(first, second) == count_edits(second, first) == edits


@pytest.mark.full
def test_one_wrong_letter_is_found_in_every_long_name():
    generator = random.Random(1)
    names = list(vocabulary())
    for name in (name for name in names if len(name) >= 8):
        at = generator.randrange(1, len(name))
        wrong = name[:at] + generator.choice(string.ascii_lowercase) + name[at + 1 :]
        if wrong not in names:
            assert count_edits(find_misspelled(wrong, names) or "", wrong) <= 1 + wrong.count("_"), wrong


@pytest.mark.parametrize(
    "name", ["network", "optimizer", "epochs", "steps", "lr", "warmup", "rank", "vea", "train_dir"]
)
def test_another_word_is_no_typing_error(name):
    assert find_misspelled(name, vocabulary()) is None


@pytest.mark.parametrize(
    "name", ["Network_Dim", "network-dim", "networkDim", "networkdim", "network_dmi", "netwrok_dm"]
)
def test_case_and_signs_are_typing_errors(name):
    assert find_misspelled(name, vocabulary()) == "network_dim"
