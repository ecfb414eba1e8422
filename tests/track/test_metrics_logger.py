"""Logging of metrics: names and averages, also after a resume, and trackers that fail."""

import json
import sys
import types

import pytest

from sfumato.config import LogOptions
from sfumato.track.metrics_logger import MetricsLogger
from sfumato.track.progress import Progress
from sfumato.track.trackers import make_trackers
from track.readings import Late


def quiet(total=10, start=0):
    return Progress(total, start, plain=True, visible=False)


class Recorder:
    """A tracker that keeps its rows, but for the speed of steps that say none."""

    def __init__(self):
        self.rows = []

    def log(self, step, values):
        unknown = values.get("speed/seconds_per_step") == 0
        self.rows.append((step, {k: v for k, v in values.items() if not (unknown and k.startswith("speed/"))}))

    def close(self):
        self.rows.append("closed")


def test_series_have_sd_scripts_names_and_average_over_an_epoch():
    recorder = Recorder()
    with MetricsLogger([recorder], quiet(), window=2) as metrics:
        for step, loss in enumerate([1.0, 2.0, 4.0], 1):
            metrics.log_step(step, late := Late(loss), {"unet": 0.5})
            assert (len(recorder.rows), late.reads) == (step - 1, 0)  # one step late: nothing waits for the device
    assert recorder.rows == [
        (1, {"loss/current": 1.0, "loss/average": 1.0, "lr/unet": 0.5}),
        (2, {"loss/current": 2.0, "loss/average": 1.5, "loss/epoch_average": 1.5, "lr/unet": 0.5}),
        (3, {"loss/current": 4.0, "loss/average": 3.0, "lr/unet": 0.5}),
        "closed",
    ]


def test_speed_and_peak_memory_are_series():
    recorder = Recorder()
    with MetricsLogger([recorder], quiet(), window=4) as metrics:
        metrics.log_step(1, Late(1.0, seconds=2.0, images=3, peak_memory=7_123_456_789), {})
        metrics.log_step(2, Late(1.0, seconds=1 / 3, images=1), {})
    speeds = [{k: v for k, v in row.items() if k[:5] in ("speed", "memor")} for _, row in recorder.rows[:-1]]
    assert speeds == [
        {"speed/seconds_per_step": 2.0, "speed/images_per_second": 1.5, "memory/peak_gb": 7.123},
        {"speed/seconds_per_step": 0.3333, "speed/images_per_second": 3.0},
    ]


def test_values_measured_after_a_step_join_its_metrics():
    recorder = Recorder()
    with MetricsLogger([recorder], quiet(), window=4) as metrics:
        metrics.log_values(0, {"loss/validation/t200": 3.0})
        metrics.log_step(1, Late(1.0), {})
        metrics.log_values(1, {"loss/validation/t200": 2.0})
        metrics.log_step(2, Late(3.0), {})
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
            metrics.log_step(step, Late(loss), {})
    with MetricsLogger([before], quiet(), window=4) as metrics:
        for step, loss in enumerate(losses[:3], 1):
            metrics.log_step(step, Late(loss), {})
        metrics.flush()
        state = json.loads(json.dumps(metrics.state_dict()))
    with MetricsLogger([after], quiet(), window=4) as metrics:
        metrics.load_state_dict(state)
        for step, loss in enumerate(losses[3:], 4):
            metrics.log_step(step, Late(loss), {})
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
            metrics.log_step(step, Late(1.0), {})
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
            metrics.log_step(step, Late(1.0), {})
    lines = (tmp_path / "x.run.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert len(warnings()) == 1
    assert "no route to host" in warnings()[0]
    wandb.init = refuse
    (only,) = make_trackers(LogOptions(log_with="wandb"), tmp_path, "y", 0, {})
    only.close()
    assert "no route to host" in warnings()[1]
