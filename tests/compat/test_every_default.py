"""A configuration that holds every option of a script at its default, as programs that know all of them write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compat.helpers import THEIR_OPTIONS, list_needed
from families.toys import ToyShelf
from sfumato.compat.launch import main as run_script
from sfumato.compat.scripts import SCRIPTS, Script
from toy_runs import make_arguments, make_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 2)


def list_defaults(script: Script) -> dict[str, Any]:
    """Option -> default of sd-scripts; None where there is none."""
    found: dict[str, Any] = {}
    for name, facts in THEIR_OPTIONS["adapter" if script.method == "leco" else script.method].items():
        scripts, default = facts["scripts"], facts["default"]
        if scripts == "all" or script.name in scripts:
            found[name] = default["by script"].get(script.name) if isinstance(default, dict) else default
    return found


def write_defaults(script: Script, path: Path, *, empty: bool) -> Path:
    """empty: what has no default is an empty text, as windows write it; else it is left out, as sd-scripts does."""
    values = {name: "" if value is None else value for name, value in list_defaults(script).items()}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if empty or value != ""]
    path.write_text("\n".join(["[everything]", *lines]) + "\n")
    return path


@pytest.mark.full
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_with_every_default_changes_no_plan(
    name: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = SCRIPTS[name]
    argv = make_arguments(
        toy_shelf.paths(script.family or "flux"), images, tmp_path / "out", **list_needed(script, images)
    )
    file = write_defaults(script, tmp_path / "all.toml", empty=True)
    plans: list[list[str]] = []
    for further in ([], ["--config_file", str(file)]):
        assert run_script([name, *argv, *further, "--plan"]) == 0
        lines = capsys.readouterr().out.splitlines()
        plans.append(lines[lines.index("model") :])  # below the options and the notes on them
    assert plans[0] == plans[1]


@pytest.mark.full
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_with_it(name: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    script = SCRIPTS[name]
    options = {**list_needed(script, images), "max_train_steps": 1, "max_data_loader_n_workers": 0}
    options |= {"max_denoising_steps": 2} if script.method == "leco" else {}
    argv = make_arguments(toy_shelf.paths(script.family or "flux"), images, tmp_path / "out", **options)
    file = write_defaults(script, tmp_path / "all.toml", empty=False)
    assert run_script([name, *argv, "--config_file", str(file)]) == 0
    assert any(path.suffix in (".safetensors", ".pt", ".ckpt") for path in (tmp_path / "out").rglob("*"))
