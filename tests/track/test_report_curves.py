"""Curves read from a run's metrics file, and the loss by noise level."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sfumato.track.report import rebuild_report
from sfumato.track.report_curves import Curves, loss_by_level
from track.report_pages import PageParser, write_lines


def test_broken_lines_are_skipped(tmp_path):
    write_lines(tmp_path, range(1, 4))
    with (tmp_path / "cat.run.jsonl").open("a") as file:
        file.write('[1]\n{"step": "4"}\nnonsense\n{"step": 5, "timesteps": 3}\n{"step": 6, "loss/curr')
    curves = Curves(tmp_path / "cat.run.jsonl")
    curves.read()
    assert list(curves.steps) == [1, 2, 3]
    assert "0.3333" in PageParser(rebuild_report(tmp_path, None).read_text()).text


def test_lines_are_read_once_and_an_incomplete_line_when_it_is_complete(tmp_path):
    path = tmp_path / "cat.run.jsonl"
    curves = Curves(path)
    curves.read()
    assert curves.last == 0
    write_lines(tmp_path, range(1, 3), grad_norm=1.0)
    with path.open("a") as file:
        file.write('{"step": 3, "loss/cur')
    curves.read()
    assert curves.last == 2
    with path.open("a") as file:
        file.write('rent": 0.25, "late": 4.0}\n{"step": 4, "loss/current": null}\n')
    curves.read()
    assert [values.tolist() for values in curves.xy("loss/current")] == [[1, 2, 3], [1, 0.5, 0.25]]
    assert [values.tolist() for values in curves.xy("late")] == [[3], [4]]
    assert curves.nonfinite_steps() == [4]
    path.write_text("")  # another run under the same name
    curves.read()
    assert curves.last == 0


def test_loss_by_noise_level_is_the_mean_of_the_samples(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"step": step, "timesteps": rng.uniform(0, 1000, 4).tolist(), "loss/samples": rng.uniform(0, 1, 4).tolist()}
        for step in range(1, 91)
    ]
    (tmp_path / "cat.run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = Curves(tmp_path / "cat.run.jsonl")
    curves.read()
    for i, level in enumerate(loss_by_level(curves)):
        for part, value, count in (
            (rows[:30], level.early, level.early_count),
            (rows[60:], level.late, level.late_count),
        ):
            pairs = [pair for row in part for pair in zip(row["timesteps"], row["loss/samples"], strict=True)]
            losses = [loss for t, loss in pairs if int(t // 100) == i]
            assert count == len(losses)
            assert value == pytest.approx(sum(losses) / len(losses))
