"""Logging of metrics: names and averages, also after a resume, and trackers that fail."""

import json
import sys
import types

import pytest
import torch

from sfumato.config import LogOptions
from sfumato.track.metrics_logger import MetricsLogger
from sfumato.track.progress import Progress
from sfumato.track.trackers import make_trackers


def quiet(total=10, start=0):
    return Progress(total, start, plain=True, visible=False)


class Recorder:
    """A tracker that keeps its rows."""

    def __init__(self):
        self.rows = []

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.rows.append("closed")


def test_series_have_sd_scripts_names_and_average_over_an_epoch():
    recorder = Recorder()
    with MetricsLogger([recorder], quiet(), window=2) as metrics:
        for step, loss in enumerate([1.0, 2.0, 4.0], 1):
            metrics.log_step(step, torch.tensor(loss), {"unet": 0.5})
            assert len(recorder.rows) == step - 1  # one step late, so that nothing waits for the device
    assert recorder.rows == [
        (1, {"loss/current": 1.0, "loss/average": 1.0, "lr/unet": 0.5}),
        (2, {"loss/current": 2.0, "loss/average": 1.5, "loss/epoch_average": 1.5, "lr/unet": 0.5}),
        (3, {"loss/current": 4.0, "loss/average": 3.0, "lr/unet": 0.5}),
        "closed",
    ]


def test_values_measured_after_a_step_join_its_metrics():
    recorder = Recorder()
    with MetricsLogger([recorder], quiet(), window=4) as metrics:
        metrics.log_values(0, {"loss/validation/t200": 3.0})
        metrics.log_step(1, torch.tensor(1.0), {})
        metrics.log_values(1, {"loss/validation/t200": 2.0})
        metrics.log_step(2, torch.tensor(3.0), {})
    assert recorder.rows == [
        (0, {"loss/validation/t200": 3.0}),
        (1, {"loss/current": 1.0, "loss/average": 1.0, "loss/validation/t200": 2.0}),
        (2, {"loss/current": 3.0, "loss/average": 2.0}),
        "closed",
    ]


def test_the_average_continues_after_a_resume():
    losses = [0.1, 0.7, 0.2, 0.9, 0.4, 0.3]
    straight, before, after = Recorder(), Recorder(), Recorder()
    with MetricsLogger([straight], quiet(), window=4) as metrics:
        for step, loss in enumerate(losses, 1):
            metrics.log_step(step, torch.tensor(loss), {})
    with MetricsLogger([before], quiet(), window=4) as metrics:
        for step, loss in enumerate(losses[:3], 1):
            metrics.log_step(step, torch.tensor(loss), {})
        metrics.flush()
        state = json.loads(json.dumps(metrics.state_dict()))
    with MetricsLogger([after], quiet(), window=4) as metrics:
        metrics.load_state_dict(state)
        for step, loss in enumerate(losses[3:], 4):
            metrics.log_step(step, torch.tensor(loss), {})
    assert before.rows[:-1] + after.rows[:-1] == straight.rows[:-1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("No space left on device")])
def test_a_tracker_that_fails_is_tried_again_with_one_warning(error, warnings):
    class Broken(Recorder):
        def log(self, step, values):
            if step < 3:
                raise error
            super().log(step, values)

    recorder, broken = Recorder(), Broken()
    with MetricsLogger([broken, recorder], quiet(), window=2) as metrics:
        for step in (1, 2, 3):
            metrics.log_step(step, torch.tensor(1.0), {})
    assert [row[0] for row in recorder.rows[:-1]] == [1, 2, 3]
    assert [row[0] for row in broken.rows[:-1]] == [3]
    assert len(warnings()) == 1
    assert "Broken" in warnings()[0]
    assert "No space left on device" in warnings()[0]


def test_a_failing_wandb_is_a_warning(tmp_path, monkeypatch, warnings):
    wandb = types.ModuleType("wandb")
    wandb.Error = type("Error", (Exception,), {})
    wandb.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def refuse(*_, **__):
        raise wandb.Error("no route to host")

    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=refuse)
    wandb.init = lambda **settings: run
    trackers = make_trackers(LogOptions(log_with="wandb"), tmp_path, "x", 0, {})
    run.log = refuse
    with MetricsLogger(trackers, quiet(), window=2) as metrics:
        for step in (1, 2, 3):
            metrics.log_step(step, torch.tensor(1.0), {})
    lines = (tmp_path / "x.run.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert len(warnings()) == 1
    assert "no route to host" in warnings()[0]
    wandb.init = refuse
    (only,) = make_trackers(LogOptions(log_with="wandb"), tmp_path, "y", 0, {})
    only.close()
    assert "no route to host" in warnings()[1]
