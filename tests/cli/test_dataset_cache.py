"""`sfumato dataset cache`: options, tasks, and faults."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from sfumato.cli.main import main
from sfumato.config.values import parse_shard


@pytest.fixture
def calls(monkeypatch):
    """What the command would do, with the config and the rest of what it is given."""
    made = []

    def named(name):
        def run(config, **given):
            made.append((name, config, given))
            return SimpleNamespace(close=lambda: None) if name == "fill" else None

        return run

    filling = SimpleNamespace(fill_dataset_caches=named("fill"))
    maintenance = SimpleNamespace(**{name: named(name) for name in ("show_stats", "verify_cache", "prune_cache")})
    monkeypatch.setitem(sys.modules, "sfumato.tools.dataset_cache", filling)
    monkeypatch.setitem(sys.modules, "sfumato.tools.cache_maintenance", maintenance)
    return made


@pytest.fixture
def argv(tmp_path) -> list[str]:
    (tmp_path / "1_a").mkdir()
    return ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path), "--resolution", "64"]


CACHES = ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")


@pytest.mark.parametrize(
    ("words", "on_disk"),
    [
        ([], {"cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"}),
        (["--cache_latents"], {"cache_latents_to_disk"}),
        (["--cache_text_encoder_outputs_to_disk"], {"cache_text_encoder_outputs_to_disk"}),
        (["--cache_latents", "--cache_text_encoder_outputs"], {CACHES[1], CACHES[3]}),
        (["--text_cache_variants", "3"], {"cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"}),
    ],
)
def test_what_is_filled_goes_to_disk(argv, calls, words, on_disk):
    assert main(["dataset", "cache", *argv, *words]) == 0
    ((name, config, given),) = calls
    assert (name, given) == ("fill", {"machine": (0, 1)})
    assert {each for each in CACHES if config.value(each) and each.endswith("to_disk")} == on_disk
    assert all(config.value(each.removesuffix("_to_disk")) for each in on_disk)
    assert not config.notes


def test_looking_after_a_cache_needs_neither_model_nor_data(calls, tmp_path):
    place = ["--cache_dir", str(tmp_path)]
    for words in (["--stats"], ["--verify"], ["--prune"], ["--prune", "--yes", "--unused_for", "1.5"]):
        assert main(["dataset", "cache", *words, *place]) == 0
    assert [(name, given) for name, _, given in calls] == [
        ("show_stats", {}),
        ("verify_cache", {}),
        ("prune_cache", {"yes": False, "unused_days": None}),
        ("prune_cache", {"yes": True, "unused_days": 1.5}),
    ]


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ("--stats --prune", "cache-tasks-conflict", "--stats and --prune"),
        ("--stats --yes", "prune-option-without-prune", "--yes"),
        ("--stats --unused_for 3", "prune-option-without-prune", "--unused_for"),
        ("--prune --unused_for soon", "option-type-wrong", "'soon'"),
        ("--prune --unused_for -1", "option-out-of-range", "'-1' is below 0"),
        ("--verify --shard 1/2", "shard-without-filling", "--verify"),
        ("--shard", "option-value-missing", "--shard I/N"),
        ("--shard 3/2", "option-value-malformed", "'3/2'"),
        ("--verfy --stats", "option-unknown", "did you mean --verify?"),
        ("", "model-missing", "--pretrained_model_name_or_path"),
        ("--vae_batch_sise 2 --stats", "option-unknown", "did you mean --vae_batch_size?"),
        ("--prune folder", "switch-with-value", "--prune"),
    ],
)
def test_faults(calls, capsys, codes, words, code, named):
    assert main(["dataset", "cache", *words.split()]) == 2
    assert codes[0] == code
    assert named in capsys.readouterr().err
    assert not calls


def test_faults_of_own_options_and_of_training_come_together(calls, codes):
    assert main(["dataset", "cache", "--stats", "--prune", "--shard", "x", "--seed", "x", "--sed", "1"]) == 2
    assert codes == ["option-unknown", "option-value-malformed", "option-type-wrong", "cache-tasks-conflict"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none(text):
    with pytest.raises(ValueError, match="is not a part"):
        parse_shard(text)


def test_parts_of_machines(argv, calls):
    assert main(["dataset", "cache", *argv, "--shard", "2/3"]) == 0
    assert main(["dataset", "cache", *argv, "--shard=3/3"]) == 0
    assert [given for _, _, given in calls] == [{"machine": (1, 3)}, {"machine": (2, 3)}]


def test_help(capsys):
    assert main(["dataset"]) == main(["dataset", "--help"]) == main(["dataset", "cache", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--verify", "--prune", "--stats", "--shard", "I/N"))
    assert main(["dataset", "cach"]) == 2
    assert "did you mean 'cache'?" in capsys.readouterr().err
