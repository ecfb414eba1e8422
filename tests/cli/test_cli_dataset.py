"""`sfumato dataset cache` and the field's two caching scripts: words, options, and what they are told to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfumato.cli.dataset import machine_of
from sfumato.cli.main import main
from sfumato.common.names import OPTION_ALIASES, PLANNED_SCRIPTS
from sfumato.compat.cache_tools import CACHE_TOOLS, FAMILY_WORDS, IDLE_WORDS
from sfumato.compat.launch import main as compat
from sfumato.config.schema import vocabulary
from sfumato.errors import UserError

ROOT = Path(__file__).parents[2]
FIELD = json.loads((ROOT / "tests" / "goldens" / "cache_tool_options.json").read_text())


@pytest.fixture
def calls(monkeypatch):
    """What the command would do, with the config and the rest of what it is given."""
    made = []

    def named(name):
        def run(config, **given):
            made.append((name, config, given))
            return SimpleNamespace(close=lambda: None) if name == "fill_caches" else None

        return run

    tool = SimpleNamespace(**{name: named(name) for name in ("fill_caches", "show_stats", "verify", "prune_cache")})
    monkeypatch.setitem(sys.modules, "sfumato.tools.dataset_cache", tool)
    monkeypatch.setattr("sfumato.tools.dataset_cache", tool, raising=False)
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
    assert (name, given) == ("fill_caches", {"machine": (0, 1)})
    assert {each for each in CACHES if config.value(each) and each.endswith("to_disk")} == on_disk
    assert all(config.value(each.removesuffix("_to_disk")) for each in on_disk)
    assert not config.notes


def test_looking_after_a_cache_needs_neither_model_nor_data(calls, tmp_path):
    place = ["--cache_dir", str(tmp_path)]
    for words in (["--stats"], ["--verify"], ["--prune"], ["--prune", "--yes", "--unused_for", "1.5"]):
        assert main(["dataset", "cache", *words, *place]) == 0
    assert [(name, given) for name, _, given in calls] == [
        ("show_stats", {}),
        ("verify", {}),
        ("prune_cache", {"yes": False, "unused_days": None}),
        ("prune_cache", {"yes": True, "unused_days": 1.5}),
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--stats --prune", "--stats and --prune are two different things to do — give one of them"),
        ("--yes", "--yes only goes with --prune"),
        ("--stats --unused_for 3", "--unused_for only goes with --prune"),
        ("--prune --unused_for soon", "'soon' is not a number of days"),
        ("--verify --shard 1/2", "--shard is for filling"),
        ("--shard", "--shard needs a value"),
        ("--verfy", "--verfy is not an option — did you mean --verify?"),
        ("", "no model to start from"),
        ("--vae_batch_sise 2 --stats", "did you mean --vae_batch_size?"),
    ],
)
def test_faults(calls, capsys, words, told):
    assert main(["dataset", "cache", *words.split()]) == 2
    assert told in capsys.readouterr().err
    assert not calls


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none(text, argv, calls, capsys):
    with pytest.raises(UserError, match="is not a part"):
        machine_of(text)


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


@pytest.mark.parametrize("name", CACHE_TOOLS)
def test_every_option_of_the_field_is_known(name):
    ours = set(vocabulary()) | set(OPTION_ALIASES) | {word.removeprefix("--") for word in (*FAMILY_WORDS, *IDLE_WORDS)}
    assert set(FIELD[f"{name}.py"]) <= ours
    assert name not in PLANNED_SCRIPTS


@pytest.mark.parametrize(("words", "family"), [([], "sd"), (["--sdxl"], "sdxl"), (["--flux"], "flux")])
@pytest.mark.parametrize("name", CACHE_TOOLS)
def test_the_fields_scripts_fill_one_cache_for_the_family_named(name, words, family, argv, calls, capsys):
    assert compat([f"{name}.py", *words, "--skip_existing", *argv]) == 0
    ((_, config, _),) = calls
    kind = CACHE_TOOLS[name]
    assert config.run.family == family
    assert {each for each in CACHES if config.value(each)} == {kind, f"{kind}_to_disk"}
    assert "--skip_existing has no effect" in capsys.readouterr().err


def test_two_families_are_refused(argv, capsys):
    assert compat(["tools/cache_latents", "--sdxl", "--flux", *argv]) == 2
    assert "--sdxl and --flux are two families" in capsys.readouterr().err


@pytest.mark.parametrize("name", CACHE_TOOLS)
def test_a_launcher_runs_from_anywhere(name, tmp_path):
    words = [sys.executable, str(ROOT / "launchers" / f"{name}.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={})
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: sfumato dataset cache" in done.stdout
