"""Asked to stop: in one process at any stage, and in two at random moments."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import sfumato.train
from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.common.stop_signals import LAST_STOP
from sfumato.config import load_config
from sfumato.formats.state import find_newest_state, load_state
from sfumato.training.run import Run
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy
from training.stop_moments import try_moments

Toy = Mapping[str, Path]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def no_earlier_stop() -> Iterator[None]:
    LAST_STOP.time = -math.inf
    yield
    LAST_STOP.time = -math.inf


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def signal_before(monkeypatch: pytest.MonkeyPatch, place: str, *, number: int = signal.SIGTERM, times: int = 1) -> None:
    """When the function at `place` is first called, the process gets the signal."""
    module, _, name = place.rpartition(".")
    normal: Callable[..., Any] = getattr(sys.modules[module], name)
    left = [times]

    def interrupted(*given: Any, **more: Any) -> Any:
        while left[0]:
            left[0] -= 1
            os.kill(os.getpid(), number)
        return normal(*given, **more)

    monkeypatch.setattr(sys.modules[module], name, interrupted)


@pytest.mark.fast_for("1-SIGTERM")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("times", [1, 2])  # a terminal and a launcher may both pass it on
def test_a_signal_in_a_step_saves_the_state_after_it(
    number: int, times: int, toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train_toy(toy, images, tmp_path / "straight", max_train_steps=2)
    with monkeypatch.context() as patch:
        signal_before(patch, "sfumato.train.compute_loss", number=number, times=times)
        assert main(["train", *make_arguments(toy, images, tmp_path / "out", max_train_steps=2)]) == 0
    folder = find_newest_state(tmp_path / "out")
    assert load_state(folder)[0]["counters"]["step"] == 1
    train_toy(toy, images, tmp_path / "out", max_train_steps=2, resume=folder)
    assert equal_tensors(read_weights(straight), read_weights(tmp_path / "out"))
    assert read_metrics(straight) == read_metrics(tmp_path / "out")


@pytest.mark.full
def test_the_second_wish_ends_at_once(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    normal = sfumato.train.compute_loss

    def impatient(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        LAST_STOP.time = -math.inf  # some seconds later
        os.kill(os.getpid(), signal.SIGINT)
        return normal(*given)

    monkeypatch.setattr(sfumato.train, "compute_loss", impatient)
    assert main(["train", *make_arguments(toy, images, tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert not list((tmp_path / "out").glob("*-state"))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("place", ["plan_report.make_run_plan", "setup_run.open_model", "loaders.fill_caches"])
def test_before_the_first_step_a_line_and_an_exit_code(
    place: str, number: int, toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    signal_before(monkeypatch, f"sfumato.training.{place}", number=number)
    assert main(["train", *make_arguments(toy, images, tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert not (tmp_path / "out").exists()  # neither a lock nor an empty folder is left


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_generate_and_dataset_cache_end_alike(
    number: int, toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import sfumato.tools.dataset_cache
    import sfumato.tools.generate  # noqa: F401 -- found by name

    signal_before(monkeypatch, "sfumato.tools.generate.generate_steps", number=number)
    model = ["--pretrained_model_name_or_path", str(toy["pretrained_model_name_or_path"])]
    words = ["generate", *model, "--prompt", "a cat --w 64 --h 64 --s 2", "--outdir", str(tmp_path / "images")]
    assert main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    LAST_STOP.time = -math.inf
    signal_before(monkeypatch, "sfumato.tools.dataset_cache.fill_caches", number=number)
    words = ["dataset", "cache", *model, "--train_data_dir", str(images), "--cache_dir", str(tmp_path / "cache")]
    assert main([*words, "--cache_latents_to_disk", "--resolution", "64", "--caption_extension", ".txt"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"


@pytest.mark.full
def test_a_stop_cuts_previews_and_validation_short_and_the_resumed_run_makes_up_for_the_latter(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    options = {
        "max_train_steps": 3, "validation_split": 0.4, "validate_every_n_steps": 2, "save_state": True,
        "sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 2,
    }  # fmt: skip
    straight = train_toy(toy, images, tmp_path / "straight", **options)
    import sfumato.training.validation

    normal, calls = sfumato.training.validation.load_latents, [0]

    def interrupted(run: Run, *given: Any) -> Any:
        calls[0] += run.step == 2
        if calls[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return normal(run, *given)

    with monkeypatch.context() as patch:
        patch.setattr(sfumato.training.validation, "load_latents", interrupted)
        assert main(["train", *make_arguments(toy, images, tmp_path / "out", **options)]) == 0
    assert calls[0] == 1, "the second image was not looked at"
    assert not list((tmp_path / "out" / "sample").glob("*.png"))
    folder = find_newest_state(tmp_path / "out")
    assert load_state(folder)[0]["counters"]["step"] == 2
    train_toy(toy, images, tmp_path / "out", **options, resume=folder)
    assert equal_tensors(read_weights(straight), read_weights(tmp_path / "out"))
    best = [load_state(path / "lora-state")[0]["best"] for path in (straight, tmp_path / "out")]
    assert best[0] == best[1]
    losses = [
        [row["loss/validation/step_average"] for row in read_metrics(path) if "loss/validation/step_average" in row]
        for path in (straight, tmp_path / "out")
    ]
    assert losses[0] == losses[1]


def test_a_state_that_cannot_be_saved_is_one_line(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: Any) -> None:
        raise PermissionError(13, "Permission denied")

    signal_before(monkeypatch, "sfumato.train.compute_loss")
    monkeypatch.setattr("sfumato.training.saving.write_state", refuse)
    assert main(["train", *make_arguments(toy, images, tmp_path / "out")]) == 2
    assert "after step 1" in capsys.readouterr().err.splitlines()[-1]


def test_training_called_from_python_can_be_stopped_too(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal_before(monkeypatch, "sfumato.train.compute_loss")
    sfumato.train.train(load_config(make_arguments(toy, images, tmp_path / "out")))
    assert load_state(find_newest_state(tmp_path / "out"))[0]["counters"]["step"] == 1
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.full
def test_two_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    """A few of the moments of stop_moments.py, which can be run alone for many: stops, errors and kills."""
    assert try_moments(2, tmp_path, seed=1) == [""] * 6
