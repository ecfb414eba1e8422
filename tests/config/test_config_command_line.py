"""The command line: every wrong word is found, and told with the right spelling."""

from __future__ import annotations

import random
import string

import pytest

from sfumato.common.names import OPTION_ALIASES
from sfumato.config.command_line import read_command_line
from sfumato.config.schema import vocabulary
from sfumato.errors import Problems

LETTERS = string.ascii_lowercase + string.digits + "_"


def mutations(name: str) -> set[str]:
    """Every name one letter away: one left out, added, replaced, or two neighbours exchanged."""
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    without = {a + b[1:] for a, b in cuts if b}
    added = {a + letter + b for a, b in cuts for letter in LETTERS}
    replaced = {a + letter + b[1:] for a, b in cuts if b for letter in LETTERS}
    exchanged = {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return (without | added | replaced | exchanged) - {name, ""}


def spellings() -> set[str]:
    """Everything that is an option, switched off or under an old name included."""
    switches = {f"no_{name}" for name, option in vocabulary().items() if option.kind == "flag"}
    return {*vocabulary(), *OPTION_ALIASES, *switches}


def told(argv: list[str]) -> list[str]:
    problems = Problems()
    read_command_line(argv, problems)
    return [str(problem) for problem in problems.found]


def sample() -> dict[str, str]:
    """Some mutations of every option: mutation -> option."""
    chosen = random.Random(0)
    valid = spellings()
    return {
        wrong: name
        for name in vocabulary()
        for wrong in chosen.sample(sorted(mutations(name) - valid), 2)
        if not any(other.startswith(wrong) for other in vocabulary())
    }


def test_each_mutation_is_rejected_and_the_right_name_suggested():
    wrong = sample()
    found = told([f"--{each}" for each in wrong])
    assert len(found) == len(wrong) > 400
    assert all("is not an option" in text for text in found)
    right = sum(f"did you mean --{name}?" in text for text, name in zip(found, wrong.values(), strict=True))
    assert right / len(wrong) > 0.97


def test_no_mutation_whatever_is_accepted(monkeypatch):
    """One in forty of all; the search for suggestions is left out for time."""
    monkeypatch.setattr("sfumato.config.layer.nearest_option", lambda name: None)
    valid = spellings()
    every = sorted({wrong for name in vocabulary() for wrong in mutations(name)} - valid)[::40]
    assert len(told([f"--{each}" for each in every])) == len(every) > 5_000


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("--network_di", "write --network_dim"),
        ("--seed_", "did you mean --seed?"),
        ("--network-dim", "write --network_dim"),
        ("-network_dim", "write --network_dim"),
        ("—network_dim", "write --network_dim"),
        ("--Network_Dim", "did you mean --network_dim?"),
        ("--save_every", "write --save_every_n_epochs, --save_every_n_steps"),
        ("--caption_extensio", "write --caption_extension"),
        ("--no_cache_latent", "did you mean --cache_latents?"),
    ],
)
def test_the_fix(word, fix):
    assert told([word, "8"])[0].endswith(fix)


def test_a_name_like_nothing_gets_no_suggestion():
    assert told(["--zzzzzzzz"]) == ["--zzzzzzzz is not an option"]


def test_values():
    problems = Problems()
    layer = read_command_line(
        ["--seed", "-5", "--network_args", "a=1", "b=2", "--caption_prefix=--x", "--cache_latents", "--optimizer_args"],
        problems,
    )
    assert not problems.found
    assert layer.values == {
        "seed": "-5",
        "network_args": ("a=1", "b=2"),
        "caption_prefix": "--x",
        "cache_latents": True,
        "optimizer_args": (),
    }


def test_a_switch_is_switched_off_and_names_with_no_keep_their_meaning():
    layer = read_command_line(["--no_cache_latents", "--no_metadata", "--no_no_half_vae"], Problems())
    assert layer.values == {"cache_latents": False, "no_metadata": True, "no_half_vae": False}


def test_no_option_is_hidden_by_a_negation():
    switches = {f"no_{name}" for name, option in vocabulary().items() if option.kind == "flag"}
    assert not switches & set(vocabulary())


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--cache_latents", "true"], "--cache_latents is a switch and takes no value"),
        (["--cache_latents=true"], "--cache_latents is a switch and takes no value"),
        (["--seed"], "--seed needs a value — write --seed N"),
        (["--seed", "--debug"], "--seed needs a value"),
        (["--seed", "1", "2"], "unexpected '2' after --seed, which takes one value"),
        (["oops", "--seed", "1"], "unexpected 'oops' at the start"),
    ],
)
def test_misplaced_values(argv, text):
    assert len(told(argv)) == 1
    assert told(argv)[0].startswith(text)


def test_an_old_spelling_is_its_option(load):
    assert load("--caption_extention .txt").captions.caption_extension == ".txt"


def test_an_option_given_twice_is_noted(load):
    config = load("--seed 1 --seed 2")
    assert config.loop.seed == 2
    assert config.notes == ("--seed is given twice; the last one counts",)
