"""--profile writes what the steps did, for the viewers that everybody has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from families.toys import ToyShelf
from sfumato.training.step_trace import WARM_UP, StepTrace
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy


def trace(folder: Path, *, count: int, steps: int) -> list[str]:
    """The operators that a trace of a run of square roots 0, 1, 2 ... holds, by their sizes."""
    traced = StepTrace(folder, "x", torch.device("cpu"), count=count, steps=steps)
    for step in range(steps):
        traced.before_step()
        torch.ones(step + 1).sqrt()
        traced.after_step()
    traced.finish()
    if not traced.path.is_file():
        return []
    events = json.loads(traced.path.read_text())["traceEvents"]
    return [str(event["args"]["Input Dims"]) for event in events if event.get("name") == "aten::sqrt"]


@pytest.mark.parametrize(
    ("count", "steps", "first"),
    [(2, 10, WARM_UP), (2, 5, WARM_UP), (2, 4, 2), (3, 3, 0), (5, 2, 0), (0, 3, 0)],
)
def test_the_steps_after_the_first_ones_are_traced(tmp_path: Path, count: int, steps: int, first: int) -> None:
    """As many as were asked for, or as there are."""
    expected = [f"[[{step + 1}]]" for step in range(first, min(first + count, steps))]
    assert trace(tmp_path, count=count, steps=steps) == expected


def test_a_run_that_ends_early_writes_what_there_is(tmp_path: Path) -> None:
    traced = StepTrace(tmp_path, "x", torch.device("cpu"), count=4, steps=4)
    traced.before_step()
    traced.after_step()
    traced.finish()
    assert traced.path.is_file()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_its_memory_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("memory"))
    traced = StepTrace(tmp_path, "x", torch.device("cuda"), count=1, steps=1)
    traced.before_step()
    traced.after_step()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.memory.pickle", "x.trace.json"]
    assert [list(options) for options in calls] == [["max_entries"], ["enabled"]]


def test_a_trace_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    traced = StepTrace(tmp_path / "file" / "no-folder", "x", torch.device("cpu"), count=1, steps=1)
    (tmp_path / "file").write_text("")
    traced.before_step()
    traced.after_step()
    assert "tracing steps" in caplog.text


@pytest.mark.full
def test_training_with_it_is_the_same(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    toy, images = toy_shelf.paths("sd"), make_images(tmp_path / "images", 2)
    options = {"network_train_unet_only": True, "max_train_steps": 2}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    traced = train_toy(toy, images, tmp_path / "traced", **options, profile=1)
    assert equal_tensors(read_weights(plain), read_weights(traced))
    assert read_metrics(plain) == read_metrics(traced)
    events = json.loads((traced / "lora.trace.json").read_text())["traceEvents"]
    assert any("adamw" in str(event.get("name")).lower() for event in events)
