"""`sfumato plan`: what it says is what a run does, and it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.demo.toy import write_toy
from sfumato.plan import look, model_lines, public_options, with_seed
from training import arguments, pictures, run, weights


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux", "chroma", "sd3", "lumina"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return write_toy(request.param, tmp_path_factory.mktemp(request.param))


def test_the_header_tells_what_trains(toy: Mapping[str, Path], tmp_path: Path) -> None:
    images = pictures(tmp_path / "images")
    argv = arguments(toy, images, tmp_path / "out", max_train_steps=1)
    outlook = look(with_seed(load_config(argv)), processes=1)
    planned = outlook.method.plan(outlook.blueprint)
    found = weights(run(toy, images, tmp_path / "out", max_train_steps=1))
    assert sum(row.modules for row in planned) == sum(name.endswith("alpha") for name in found)
    assert sum(row.parameters for row in planned) == sum(t.numel() for n, t in found.items() if not n.endswith("alpha"))
    assert all(f"{row.parameters:,}" in "\n".join(model_lines(outlook)) for row in planned)


def test_it_prints_everything_and_writes_nothing(
    toy: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(toy, pictures(tmp_path / "images"), tmp_path / "out", seed=None)
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", *argv]) == 0
    told = capsys.readouterr().out
    for word in ("network_dim", "command line", "bucket 64x64", "10 samples", "4, over 1 epochs", "denoiser"):
        assert word in told
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_other_models_are_reported_and_refused_when_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = write_toy("sd", tmp_path / "toy")
    argv = arguments(toy, pictures(tmp_path / "images"), tmp_path / "out", timestep_sampling="shift")
    assert main(["plan", *argv]) == 0
    assert "--timestep_sampling has no effect" in capsys.readouterr().out
    assert main(["plan", *argv, "--strict"]) == 2
    assert "--timestep_sampling has no effect" in capsys.readouterr().err


def test_what_is_written_down_has_no_paths_and_no_secrets(tmp_path: Path) -> None:
    toy = write_toy("sd", tmp_path / "toy")
    config = load_config(arguments(toy, pictures(tmp_path / "images"), tmp_path / "out"))
    assert str(tmp_path) not in str(public_options(config))
