"""Presets: each is a configuration without faults for its model, and gives way to what a user says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sfumato.cli.main import main
from sfumato.common.text import GIB
from sfumato.config import load_config
from sfumato.config.presets import FOLDER, find_preset, list_presets
from sfumato.errors import SeveralErrors, UserError
from sfumato.families.published import list_published
from sfumato.tools.published_run import make_published_options
from sfumato.tools.rehearse import ALLOWANCE

NEEDED = ["--pretrained_model_name_or_path", "m.safetensors", "--train_data_dir", "images", "--output_dir", "out"]
ONE_OF_EACH = {preset.title: name for name, preset in list_presets().items()}  # the one for the largest card


def read(name: str, *words: str):
    return load_config([*NEEDED, "--preset", name, *words], check_files=False)


def test_every_file_is_in_the_index_and_fits_its_card() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(list_presets())
    assert all(preset.needs + ALLOWANCE <= preset.card * GIB for preset in list_presets().values())


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_has_no_faults_and_nothing_in_it_is_ignored(name: str) -> None:
    config = read(name, "--strict")
    preset = find_preset(name)
    assert config.run.method == ("full" if preset.task == "full" else "adapter")
    assert name.split(f"-{preset.task}-")[0] in list_published()


def test_what_a_user_says_takes_precedence(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("network_dim = 8\nlearning_rate = 0.5\n")
    name = "sd15-lora-12gb"
    config = read(name, "--config_file", str(file), "--learning_rate", "0.25")
    assert (config.network.network_dim, config.source("network_dim")) == (8, "run.toml")
    assert (config.optim.learning_rate, config.source("learning_rate")) == (0.25, "command line")
    assert (config.network.network_alpha, config.source("network_alpha")) == (16.0, "preset")
    assert config.run.method == "adapter"


def test_a_file_has_no_preset_since_other_programs_call_other_things_so(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "attn-mlp"\n')
    config = load_config([*NEEDED, "--config_file", str(file)], check_files=False)
    assert config.run.preset is None
    assert any("preset" in note for note in config.notes)


def test_a_preset_of_another_script_is_refused() -> None:
    with pytest.raises((UserError, SeveralErrors)) as caught:
        load_config(
            [*NEEDED, "--preset", "sd15-lora-8gb"],
            defaults={"family": "sdxl", "method": "adapter"},
            absent={"family": "", "method": ""},
            check_files=False,
        )
    assert caught.value.code == "preset-of-another-script"
    config = load_config(
        [*NEEDED, "--preset", "sd15-full-8gb"],
        defaults={"family": "sd", "method": "full"},
        absent={"family": "", "method": ""},
        check_files=False,
    )
    assert config.memory.full_bf16


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="sd15-lora-8gb"):
        read("sd15-lora-8g")


def test_they_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name in ["sd15-lora-8gb"])
    assert main(["presets", "sd15-lora-8gb"]) == 0
    assert capsys.readouterr().out == find_preset("sd15-lora-8gb").path.read_text()


@pytest.mark.full
@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_a_plan_of_the_published_model_takes_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever room this disk has, since nothing will be saved on it."""
    from sfumato.plan import make_run_plan

    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=0))
    preset = find_preset(name)
    model = name.split(f"-{preset.task}-")[0]
    stand_ins = make_published_options(model, tmp_path, method=read(name).run.method)
    plan = make_run_plan(load_config(["--preset", name], defaults=stand_ins), processes=1, remember=False)
    assert plan.family.name == plan.config.run.family
