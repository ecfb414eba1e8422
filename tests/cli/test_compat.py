"""The scripts of the field: names, options, defaults, launchers, and the page of all options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfumato.common.names import (
    OPTION_ALIASES,
    PLANNED_NETWORK_MODULES,
    PLANNED_SCRIPTS,
    RETIRED_SCRIPTS,
    SCRIPT_ALIASES,
)
from sfumato.compat.launch import launch, main
from sfumato.compat.scripts import SCRIPTS, SHARED, absent_options, find_script, option_table
from sfumato.compat.table import status, table
from sfumato.config import load_config
from sfumato.config.schema import vocabulary
from sfumato.errors import SeveralErrors, UserError

ROOT = Path(__file__).parents[2]
FIELD = {
    method: json.loads((ROOT / "tests" / "goldens" / f"{file}_script_options.json").read_text())
    for method, file in {"adapter": "network", "full": "full"}.items()
}
SAME = {"save_model_as", "guidance_scale"}  # None means what the field's scripts say, or the family knows better


def theirs(script: str) -> set[str]:
    field = FIELD[SCRIPTS[script].method]
    return {name for name, entry in field.items() if entry["scripts"] == "all" or script in entry["scripts"]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_options_that_it_has_in_the_field(name):
    assert SCRIPTS[name].options == (theirs(name) - set(OPTION_ALIASES)) | SHARED
    known = {*FIELD["adapter"], *FIELD["full"]} - set(OPTION_ALIASES)
    assert set(absent_options(SCRIPTS[name])) == (known | {"family", "method"}) - SCRIPTS[name].options


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_sets_the_defaults_in_which_it_differs(name):
    for option in theirs(name) - set(OPTION_ALIASES) - SAME:
        given = FIELD[SCRIPTS[name].method][option]["default"]
        default = given["by script"][name] if isinstance(given, dict) else given
        ours = SCRIPTS[name].defaults.get(option, vocabulary()[option].default)
        assert ours == default or default is None, option


@pytest.mark.parametrize("name", SCRIPTS)
def test_presets_are_options_of_the_right_type(name):
    with pytest.raises(SeveralErrors) as raised:
        load_config([], defaults=SCRIPTS[name].presets)
    told = [str(error) for error in raised.value.errors if "not available yet" not in str(error)]
    assert [text.partition(" ")[0] for text in told] == ["no", "no", "no"]


def test_the_table_names_every_script():
    assert set(option_table()) == {"every script", *FIELD, *SCRIPTS}


@pytest.mark.parametrize("name", ["train_network", "train_network.py"])
def test_find_script(name):
    assert find_script(name) is SCRIPTS["train_network"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hunyuan_image_train_network", "hunyuan_image_train_network is not available yet — available: train_network"),
        ("sd3_train.py", "sd3_train is not available yet"),
        ("train_controlnet", "train_control_net is not available yet"),
        ("train_textual_inversion_XTI", "out of use — train_textual_inversion takes its place"),
        ("train_netwrk", "'train_netwrk' is not a script — did you mean 'train_network'?"),
    ],
)
def test_what_is_not_there(name, words):
    with pytest.raises(UserError) as raised:
        find_script(name)
    assert words in str(raised.value)


def test_names_of_scripts_do_not_overlap():
    available = {name for name, script in SCRIPTS.items() if script.available}
    assert not available & set(PLANNED_SCRIPTS)
    assert not set(RETIRED_SCRIPTS) & {*PLANNED_SCRIPTS, *available}
    assert {name for name, script in SCRIPTS.items() if not script.available} <= set(PLANNED_SCRIPTS)
    assert set(SCRIPT_ALIASES.values()) <= {*PLANNED_SCRIPTS, *available}


def test_options_of_other_scripts_are_refused_with_their_home(capsys):
    assert main(["train_network", "--clip_l", "x", "--family", "y", "--clip_lx", "z"]) == 2
    told = capsys.readouterr().err
    assert "--clip_l is not an option here — train_network does not have it; it belongs to flux_train_network" in told
    assert "--family is not an option here — the script's name says it" in told
    assert "--clip_lx is not an option — did you mean --clip_l?" in told


def test_a_script_runs_with_its_family(monkeypatch, tmp_path):
    made = []
    monkeypatch.setitem(sys.modules, "sfumato.train", SimpleNamespace(train=made.append))
    words = f"--pretrained_model_name_or_path a/b --train_data_dir {tmp_path} --output_dir o --resolution 64 --seed 4"
    assert main(["train_network", *words.split()]) == 0
    (config,) = made
    assert (config.loop.seed, config.run.family, config.run.method) == (4, "sd", "adapter")
    assert config.source("family") == "launcher"


def test_help_shows_only_what_the_script_has(capsys):
    assert main(["train_network", "--help"]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: train_network.py" in printed
    assert "--clip_l" not in printed
    assert all((f"  {name} (not available yet)" in printed) != script.available for name, script in SCRIPTS.items())


@pytest.mark.parametrize("argv", [["--seed", "3"], ["nonsense"]])
def test_without_a_script(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_worker_that_imports_a_launcher_starts_nothing():
    launch("__mp_main__", "train_network")


def run_launcher(*words: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Neither installed nor on the path: only the launcher knows where the package is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(words, env=environment, cwd=where, capture_output=True, text=True)


def test_a_launcher_runs_from_anywhere(tmp_path):
    launcher = str(ROOT / "launchers" / "train_network.py")
    done = run_launcher(sys.executable, launcher, "--help", where=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_launcher(sys.executable, "train_network.py", "--sed", "1", where=ROOT / "launchers")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: 4 problems")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"],
        ["torch.distributed.run", "--nproc_per_node", "2"],
    ],
)
def test_a_launcher_runs_under_the_tools_that_start_processes(words, tmp_path):
    launcher = str(ROOT / "launchers" / "train_network.py")
    done = run_launcher(sys.executable, "-m", *words, launcher, "--help", where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: train_network.py" in done.stdout


def test_every_available_script_has_a_launcher():
    names = {path.stem for path in (ROOT / "launchers").glob("*.py")}
    assert names >= {name for name, script in SCRIPTS.items() if script.available}


def test_the_page_of_options_is_up_to_date():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == table(), "run: python -m sfumato.compat.table > docs/options.md"


# What is still to come, by the words that the page says of it; everything else works, or says why it need not.
TO_COME = (
    "fp8 weights", "block swap", "the fused backward pass", "DeepSpeed", "compiling", "the other adapters",
    "ControlNet training", "the memory options",
)  # fmt: skip


def test_every_option_works_or_says_why_not():
    for option in vocabulary().values():
        found = status(option)
        assert found == "yes" or found.startswith(("no effect: ", *(f"later: {room}" for room in TO_COME))), option.name
    assert set(PLANNED_NETWORK_MODULES.values()) <= set(TO_COME)


def test_the_page_holds_every_option_of_the_field():
    for name in set().union(*FIELD.values(), vocabulary()):
        assert f"`--{name}`" in table()
