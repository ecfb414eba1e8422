"""`sfumato plan`: what it says is what a run does, and it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.config.listing import public_options
from sfumato.plan import make_run_plan
from sfumato.training.plan_report import model_lines
from toy_runs import make_arguments, make_images, read_weights, train_toy


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux", "chroma", "sd3", "lumina"])
def toy(request: pytest.FixtureRequest, toy_shelf: ToyShelf) -> Mapping[str, Path]:
    return toy_shelf.paths(request.param)


def test_the_header_tells_what_trains(toy: Mapping[str, Path], tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    argv = make_arguments(toy, images, tmp_path / "out", max_train_steps=1)
    plan = make_run_plan(load_config(argv), processes=1)
    saved = read_weights(train_toy(toy, images, tmp_path / "out", max_train_steps=1))
    sizes = [tensor.numel() for name, tensor in saved.items() if not name.endswith("alpha")]
    assert sum(part.modules for part in plan.parts) == len(saved) - len(sizes)
    assert sum(part.parameters for part in plan.parts) == sum(sizes)
    assert all(f"{part.parameters:,}" in "\n".join(model_lines(plan)) for part in plan.parts)


def test_it_prints_everything_and_writes_nothing(
    toy: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = make_arguments(toy, make_images(tmp_path / "images"), tmp_path / "out", seed=None)
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", *argv]) == 0
    told = capsys.readouterr().out
    for word in ("network_dim", "command line", "bucket 64x64", "10 samples", "4, over 1 epoch", "denoiser"):
        assert word in told
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_other_models_are_reported_and_refused_when_strict(
    toy_shelf: ToyShelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = toy_shelf.paths("sd")
    argv = make_arguments(toy, make_images(tmp_path / "images"), tmp_path / "out", timestep_sampling="shift")
    assert main(["plan", *argv]) == 0
    assert "--timestep_sampling has no effect" in capsys.readouterr().out
    assert main(["plan", *argv, "--strict"]) == 2
    assert "--timestep_sampling has no effect" in capsys.readouterr().err


def test_what_is_written_down_has_no_paths_and_no_secrets(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    toy = toy_shelf.paths("sd")
    config = load_config(make_arguments(toy, make_images(tmp_path / "images"), tmp_path / "out"))
    shown = str(public_options(config))
    assert str(tmp_path) not in shown
    assert str(toy_shelf.folder) not in shown
