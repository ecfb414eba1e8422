"""The command line: every wrong word is reported, with the right spelling."""

from __future__ import annotations

import random
import string

import pytest

from sfumato.common.names import OPTION_ALIASES
from sfumato.config.command_line import read_command_line
from sfumato.config.schema import vocabulary
from sfumato.errors import Problems, UserError

LETTERS = string.ascii_lowercase + string.digits + "_"


def mutations(name: str) -> set[str]:
    """Every name one letter away: one dropped, added, replaced, or two neighbors exchanged."""
    wrong: set[str] = set()
    for i in range(len(name) + 1):
        head, tail = name[:i], name[i:]
        wrong |= {head + letter + tail for letter in LETTERS}
        if tail:
            wrong.add(head + tail[1:])
            wrong |= {head + letter + tail[1:] for letter in LETTERS}
        if len(tail) > 1:
            wrong.add(head + tail[1] + tail[0] + tail[2:])
    return wrong - {name, ""}


def spellings() -> set[str]:
    """Everything that is an option, switched off or under an old name included."""
    switches = {f"no_{name}" for name, option in vocabulary().items() if option.arity == "flag"}
    return {*vocabulary(), *OPTION_ALIASES, *switches}


def read_faults(argv: list[str]) -> list[UserError]:
    problems = Problems()
    read_command_line(argv, problems)
    return problems.found


def sample() -> dict[str, str]:
    """Some mutations of every option: mutation -> option."""
    generator = random.Random(0)
    valid, every = spellings(), tuple(vocabulary())
    chosen: dict[str, str] = {}
    for name in every:
        for wrong in generator.sample(sorted(mutations(name) - valid), 2):
            if not any(other.startswith(wrong) for other in every):
                chosen[wrong] = name
    return chosen


@pytest.mark.full
def test_each_mutation_is_rejected_and_the_right_name_suggested():
    wrong = sample()
    found = read_faults([f"--{each}" for each in wrong])
    assert len(found) == len(wrong) > 400
    assert {fault.code for fault in found} == {"option-unknown"}
    right = sum(f"--{name}?" in fault.fix for fault, name in zip(found, wrong.values(), strict=True))
    assert right / len(wrong) > 0.97


@pytest.mark.full
def test_no_mutation_whatever_is_accepted(monkeypatch):
    """One in forty of all; the search for suggestions is skipped for time."""
    monkeypatch.setattr("sfumato.config.option_source.find_nearest_option", lambda name, table: None)
    valid = spellings()
    wrong: set[str] = set()
    for name in vocabulary():
        wrong |= mutations(name)
    some = [name for name in sorted(wrong - valid)[::40] if not any(other.startswith(name) for other in valid)]
    assert len(read_faults([f"--{name}" for name in some])) == len(some) > 5_000


@pytest.mark.parametrize(
    ("word", "code", "fix"),
    [
        ("--seed_", "option-unknown", "--seed?"),
        ("--network-dim", "option-misspelled", "--network_dim"),
        ("-network_dim", "option-misspelled", "--network_dim"),
        ("—network_dim", "option-misspelled", "--network_dim"),
        ("--Network_Dim", "option-unknown", "--network_dim?"),
        ("--save_every", "option-abbreviated", "--save_every_n_epochs, --save_every_n_steps"),
        ("--no_cache_latent", "option-unknown", "--cache_latents?"),
    ],
)
def test_the_fix(word, code, fix):
    (fault,) = read_faults([word, "8"])
    assert fault.code == code
    assert fault.fix.endswith(fix)


@pytest.mark.parametrize("word", ["--network_di", "--network_di=8", "--caption_exten", "--save_last_n_st"])
def test_a_beginning_that_one_option_has_is_its_name(word):
    """As argparse reads it; an option of other scripts does not count."""
    problems = Problems()
    source = read_command_line([word, "8"], problems, absent={"save_last_n_steps_state"})
    assert not problems.found if "=" not in word else [fault.code for fault in problems.found] == ["words-unexpected"]
    (name,) = source.values
    assert name in {"network_dim", "caption_extension", "save_last_n_steps"}
    assert [key.name for key in source.loose] == [f"{word.partition('=')[0]} is --{name}"]


def test_an_empty_path_or_number_is_not_given(load, codes_of):
    words = ["--vae=", "--network_weights", "", "--text_encoder_lr", "", "--network_args", "", "--seed="]
    config = load([*words, "--caption_prefix="])
    assert (config.model.vae, config.network.network_weights, config.optim.text_encoder_lr) == (None, None, None)
    assert (config.network.network_args, config.loop.seed, config.captions.caption_prefix) == ({}, None, "")
    assert config.source("vae") == "default"
    assert config.notes == (
        "command line: ignored, empty: --vae, --network_weights, --text_encoder_lr, --network_args, --seed",
    )
    assert codes_of([*words, "--strict"]) == ["refused-by-strict"] * 5
    assert load(["--mixed_precision="]).source("mixed_precision") == "default"


def test_a_zero_outside_the_limits_is_not_given(load, codes_of):
    config = load(["--min_snr_gamma", "0", "--blocks_to_swap=0", "--save_every_n_epochs", "0", "--noise_offset", "0"])
    assert (config.loss.min_snr_gamma, config.memory.blocks_to_swap, config.noise.noise_offset) == (None, None, 0.0)
    assert (
        config.notes[0] == "command line: ignored, 0 for none: --min_snr_gamma, --blocks_to_swap, --save_every_n_epochs"
    )
    assert codes_of(["--clip_skip", "0", "--strict"]) == ["refused-by-strict"]
    assert codes_of(["--min_snr_gamma", "-1"]) == ["option-out-of-range"]


def test_a_name_like_nothing_gets_no_suggestion():
    (fault,) = read_faults(["--zzzzzzzz"])
    assert (fault.code, fault.fix) == ("option-unknown", "")
    assert "--zzzzzzzz" in fault.what


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
    switches = {f"no_{name}" for name, option in vocabulary().items() if option.arity == "flag"}
    assert not switches & set(vocabulary())


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--cache_latents", "true"], "switch-with-value", "--cache_latents"),
        (["--cache_latents=true"], "switch-with-value", "--cache_latents"),
        (["--seed"], "option-value-missing", "--seed N"),
        (["--seed", "--debug"], "option-value-missing", "--seed"),
        (["--seed", "1", "2"], "words-unexpected", "'2' after --seed"),
        (["oops", "--seed", "1"], "words-unexpected", "'oops' at the start"),
    ],
)
def test_misplaced_values(argv, code, text):
    (fault,) = read_faults(argv)
    assert fault.code == code
    assert text in str(fault)


def test_an_old_spelling_is_its_option(load):
    assert load("--caption_extention .txt").captions.caption_extension == ".txt"


def test_an_option_given_twice_is_noted(load):
    config = load("--seed 1 --seed 2")
    assert config.loop.seed == 2
    assert config.notes == ("--seed is given twice; the last one counts",)
