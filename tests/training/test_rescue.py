"""Any error while training saves a state first, from which the run goes on bit for bit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sfumato.train
import sfumato.training.setup_run
from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.formats.state import find_newest_state, load_state
from sfumato.training.run import Run
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

Toy = Mapping[str, Path]
SLOW = {"max_data_loader_n_workers": 0}  # an image is read when its step comes


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def straight(toy: Toy, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy(toy, images, tmp_path_factory.mktemp("straight"), max_train_steps=3)


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Call `act` when this step is complete."""
    normal = Run.complete_step

    def complete(run: Run, step: int) -> None:
        normal(run, step)
        if step == number:
            act()

    monkeypatch.setattr(Run, "complete_step", complete)


@pytest.mark.fast_for("compute_loss-error0")
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("x"), UserError("no", code="image-missing")])
@pytest.mark.parametrize("place", ["compute_loss", "run_due_saves"])
def test_whatever_raises_wherever(
    error: Exception,
    place: str,
    toy: Toy,
    images: Path,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    normal, calls = getattr(sfumato.train, place), [0]

    def fails(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise error
        return normal(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(sfumato.train, place, fails)
        with pytest.raises(type(error)) as caught:
            train_toy(toy, images, tmp_path, max_train_steps=3)
    assert caught.value is error
    folder = find_newest_state(tmp_path)
    assert load_state(folder)[0]["counters"]["step"] == (1 if place == "compute_loss" else 2)
    train_toy(toy, images, tmp_path, max_train_steps=3, resume=folder)
    assert equal_tensors(read_weights(straight), read_weights(tmp_path))
    assert read_metrics(straight) == read_metrics(tmp_path)


@pytest.mark.full
def test_an_error_inside_the_optimizers_step_says_that_the_state_is_not_exact(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    normal, calls = torch.optim.AdamW.step, [0]

    def fails(*given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("out of memory")
        return normal(*given, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_toy(toy, images, tmp_path)
    assert load_state(find_newest_state(tmp_path))[0]["counters"]["step"] == 1
    assert "not bit-identical" in capsys.readouterr().err


def test_where_the_folder_is_read_only_one_line_says_so(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: Any) -> None:
        raise PermissionError(13, "Permission denied")

    shutil.copytree(images, tmp_path / "images")
    after_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "images"))
    monkeypatch.setattr("sfumato.training.saving.write_state", refuse)
    assert main(["train", *make_arguments(toy, tmp_path / "images", tmp_path / "out", **SLOW)]) == 2
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if "saving the state after step 2 failed" in line]
    assert "Permission denied" in line
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("error: ")


def damage(folder: Path, how: str, *, but: Sequence[str] = ()) -> None:
    for path in (path for path in folder.rglob("*.png") if path.stem not in but):
        if how == "gone":
            path.unlink()
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:300])
        else:
            Image.new("RGB", (80, 72)).save(path)


@pytest.mark.full
@pytest.mark.parametrize("how", ["gone", "cut", "resized"])
def test_images_that_change_while_the_run_goes_on(
    how: str,
    toy: Toy,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(images, tmp_path / "images")
    after_step(monkeypatch, 2, lambda: damage(tmp_path / "images", how))
    assert main(["train", *make_arguments(toy, tmp_path / "images", tmp_path / "out", **SLOW)]) == 2
    told = capsys.readouterr().err
    assert ".png" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert load_state(find_newest_state(tmp_path / "out"))[0]["counters"]["step"] == 2


@pytest.mark.full
@pytest.mark.parametrize("how", ["gone", "cut", "resized"])
def test_bad_images_are_skipped_where_that_is_asked_for(
    how: str,
    toy: Toy,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another image of the bucket takes the place of a lost one, which is named once."""
    shutil.copytree(images, tmp_path / "images")
    options = {**SLOW, "on_bad_image": "skip", "max_train_steps": 6, "cache_dir": tmp_path / "cache"}
    arguments = make_arguments(toy, tmp_path / "images", tmp_path / "out", **options)
    after_step(monkeypatch, 2, lambda: damage(tmp_path / "images", how, but=("3", "4")))
    assert main(["train", *arguments]) == 0
    assert all(row["loss/current"] > 0 for row in read_metrics(tmp_path / "out"))
    told = [line for line in capsys.readouterr().err.splitlines() if "another image takes its place" in line]
    assert 1 <= len(told) <= 3
    assert len(set(told)) == len(told)


def test_weights_that_become_infinite_end_the_run_and_spoil_no_state(
    toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    normal = sfumato.training.setup_run.build_run

    def build(*given: Any) -> Run | None:
        found = normal(*given)
        assert found is not None
        runs.append(found)
        return found

    monkeypatch.setattr(sfumato.train, "build_run", build)
    after_step(monkeypatch, 2, lambda: runs[0].parameters[0].data.fill_(float("inf")))
    with pytest.raises(UserError) as caught:
        train_toy(toy, images, tmp_path, save_every_n_steps=1, save_state=True)
    assert caught.value.code == "weights-nonfinite"
    assert load_state(find_newest_state(tmp_path))[0]["counters"]["step"] == 1
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora-step00000001.safetensors"]


@pytest.mark.full
def test_a_final_save_that_fails_leaves_at_least_a_state(
    toy: Toy, images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sfumato.training.saving.save_output", full)
    with pytest.raises(UserError) as caught:
        train_toy(toy, images, tmp_path, max_train_steps=3)
    assert caught.value.code == "saves-failed"
    weights = load_state(find_newest_state(tmp_path))[0]["weights"]
    assert sum(tensor.square().sum() for tensor in weights.values()) > 0


def test_surrounding_work_may_fail_in_any_way(
    toy: Toy, images: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Report, previews, progress: a warning each, once, with the traceback in the log file; the same weights."""

    def fail(*given: Any, **more: Any) -> Any:
        raise ZeroDivisionError("in a library")

    for place in ("track.report.write_page", "track.progress.Progress.advance", "training.previews.generate_batch"):
        monkeypatch.setattr(f"sfumato.{place}", fail)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n")
    options = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 2, "max_train_steps": 3}
    log = tmp_path / "log.txt"
    output = train_toy(toy, images, tmp_path / "out", **options, console_log_file=log)
    assert equal_tensors(read_weights(straight), read_weights(output))
    lines = [line for line in log.read_text().splitlines() if " failed" in line]
    assert len(lines) == len({line.partition("WARNING")[2] for line in lines})
    assert log.read_text().count("Traceback") == len(lines) >= 3
    logging.getLogger("sfumato").handlers.clear()
