"""`sfumato train --dry_run`: everything is done once, for real, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.families.base import Family
from sfumato.memory.rehearsal.backend import is_supported
from sfumato.methods.adapter import AdapterMethod
from sfumato.plan import make_run_plan
from sfumato.tools import dry_run
from sfumato.tools.device_meter import DeviceMeter
from sfumato.tools.dry_run import format_dry_run, take_dry_run
from sfumato.tools.rehearsal_stages import STEP, Stage
from toy_runs import make_arguments, make_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "rehearse_apart", lambda config: [])


def list_rows(text: str) -> dict[str, list[str]]:
    """The table: stage -> seconds, rehearsed, measured."""
    lines = text.partition("stage  ")[2].splitlines()[1:]
    rows = [line.rsplit(maxsplit=3) for line in lines if line[-1:] in "-0123456789" and line.count("  ") > 2]
    return {name.strip(): rest for name, *rest in rows}


@pytest.mark.full
def test_the_command(toy_shelf, images, tmp_path, capsys, monkeypatch):
    """The weights train, are decoded and written; the output and cache folders are as they were."""
    output, cache, prompts = tmp_path / "out", tmp_path / "cache", tmp_path / "prompts.txt"
    output.mkdir()
    (output / "lora.safetensors").write_text("mine")
    prompts.write_text("a cat --w 64 --h 64 --s 4")
    written: dict[str, torch.Tensor] = {}
    write = AdapterMethod.write

    def write_and_look(self: AdapterMethod, model: Family, path: Path, *rest) -> None:
        write(self, model, path, *rest)
        if output in path.parents:  # not that of the rehearsal
            assert path.stat().st_size > 1000
            written.update(self.state_dict())

    monkeypatch.setattr(AdapterMethod, "write", write_and_look)
    options = {"cache_latents_to_disk": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
    options |= {"cache_dir": cache, "sample_prompts": prompts, "sample_every_n_steps": 1, "validation_split": 0.5}
    argv = make_arguments(toy_shelf.paths("flux"), images, output, **options)
    assert main(["train", *argv, "--dry_run"]) == 0
    rows = list_rows(capsys.readouterr().out)
    caching = ["caching of vae", "caching of clip_l", "caching of t5"]
    assert list(rows) == [*caching, "loading", STEP, "preview", "validation", "save"]
    assert {measured for _, _, measured in rows.values()} == {"-"}
    assert all((rehearsed != "-") == is_supported() for _, rehearsed, _ in rows.values())
    assert any("up" in name and bool(weight.any()) for name, weight in written.items())  # zeros before the step
    assert [path.name for path in output.iterdir()] == ["lora.safetensors"]
    assert (output / "lora.safetensors").read_text() == "mine"
    assert not cache.exists()


def test_an_output_folder_is_not_made(toy_shelf, images, tmp_path, unrehearsed):
    argv = make_arguments(toy_shelf.paths("sd"), images, tmp_path / "new" / "out", network_train_unet_only=True)
    assert main(["train", *argv, "--dry_run"]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unrehearsed")
@pytest.mark.parametrize("fault", ["nonfinite", "memory"])
def test_a_failed_step_is_an_error(toy_shelf, images, tmp_path, monkeypatch, codes, fault):
    predict = Family.predict

    def fail(model: Family, noisy: torch.Tensor, *rest: Any) -> torch.Tensor:
        if fault == "memory":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return predict(model, noisy, *rest) * float("nan")

    monkeypatch.setattr(Family, "predict", fail)
    argv = make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out", network_train_unet_only=True)
    assert main(["train", *argv, "--dry_run"]) == 2
    assert codes == [{"nonfinite": "dry-run-nonfinite", "memory": "dry-run-out-of-memory"}[fault]]
    assert not list(tmp_path.iterdir())


def test_full_training_writes_the_whole_model(toy_shelf, images, tmp_path, unrehearsed):
    config = load_config(
        make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out", method="full", network_dim=None)
    )
    stages, errors = take_dry_run(make_run_plan(config, processes=1), DeviceMeter(torch.device("cpu")))
    assert not errors
    assert [stage.name for stage in stages] == ["loading", STEP, "save"]
    assert all(stage.seconds > 0 for stage in stages)
    assert not list(tmp_path.iterdir())


def test_the_table():
    predicted = [Stage(name=STEP, peak=2_500_000_000, resident={}, largest=(), waits=())]
    measured = [
        Stage(name=name, peak=peak, resident={}, largest=(), waits=(), seconds=1.25)
        for name, peak in (("first step", 2_100_000_000), (STEP, 2_600_000_000))
    ]
    lines = list(format_dry_run(measured, predicted, DeviceMeter(torch.device("cuda"))))
    assert lines[1].split() == ["first", "step", "1.2", "-", "2.10"]
    assert lines[2].split() == ["training", "step", "1.2", "2.50", "2.60"]
    assert len(lines) == 5
    assert "--sample_prompts" in lines[3]


def test_it_is_for_one_process(codes, monkeypatch, toy_shelf, images, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", *make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out"), "--dry_run"]) == 2
    assert codes == ["dry-run-launched"]


@pytest.mark.parametrize("command", [["plan"], ["dataset", "cache"], ["dataset", "inspect"], ["generate"]])
def test_other_commands_do_not_have_it(codes, command):
    assert main([*command, "--dry_run"]) == 2
    assert "option-of-another-script" in codes
