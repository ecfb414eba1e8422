"""The curves of a run, read from its metrics file, and its losses by noise level."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.common.files import open_file
from sfumato.common.json_toml import decode_json

METRICS_SUFFIX = ".run.jsonl"
MAX_METRIC, MAX_STEP = 1e300, 2**53  # beyond, a value is damage
LEVELS = 10  # bins of t in 0 .. 1000
TIMESTEPS, SAMPLE_LOSSES, IMAGE_NUMBERS = "timesteps", "loss/samples", "images"  # the names of the lists in a line


class Curves:
    """Every series of a `.run.jsonl` in memory; `read` adds the complete lines that are new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()

    def read(self) -> None:
        """Does nothing where there is no file. A broken line is skipped; an incomplete last one is read later."""
        if not self.path.is_file():
            return
        if self.path.stat().st_size < self.offset:
            self._reset()
        with open_file(self.path) as file:
            file.seek(self.offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self.offset += len(complete)
        for line in complete.splitlines():
            self._add_line(line)

    def xy(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a series."""
        values = np.asarray(self.series.get(name, ()), dtype=np.float64)
        steps = np.asarray(self.steps, dtype=np.float64)[: len(values)]
        finite = np.isfinite(values)
        return steps[finite], values[finite]

    def nonfinite_steps(self) -> list[int]:
        """The steps whose loss was not finite."""
        return list(self.skipped_steps)

    @property
    def last(self) -> int:
        return self.steps[-1] if self.steps else 0

    def _reset(self) -> None:
        self.offset = 0
        self.steps: array[int] = array("q")
        self.skipped_steps: array[int] = array("q")
        self.series: dict[str, array[float]] = {}
        self.level_steps: array[int] = array("q")  # one entry for each sample
        self.level_t, self.level_losses = array("d"), array("d")
        self.level_images: array[int] = array("q")  # numbers of images; -1 where the line does not say it

    def _add_line(self, line: bytes) -> None:
        row = parse_metrics(line)
        if row is None:
            return
        step = row.pop("step")
        timesteps, losses, images = row.pop(TIMESTEPS, []), row.pop(SAMPLE_LOSSES, []), row.pop(IMAGE_NUMBERS, [])
        images = images if len(images) == len(losses) else [-1] * len(losses)
        for t, loss, image in zip(timesteps, losses, images, strict=False):
            if is_number(t) and is_number(loss):
                self.level_steps.append(step)
                self.level_t.append(t)
                self.level_losses.append(loss)
                self.level_images.append(image if is_image_number(image) else -1)
        if not is_number(row.get("loss/current", 0.0)):
            self.skipped_steps.append(step)
        for name, value in row.items():
            series = self.series.setdefault(name, array("d"))
            series.extend([math.nan] * (len(self.steps) - len(series)))
            series.append(value if is_number(value) else math.nan)
        self.steps.append(step)


def parse_metrics(line: bytes) -> dict[str, Any] | None:
    """The row of one step; None for a line that is none."""
    try:
        row = decode_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < MAX_STEP:
        return None
    lists = [row.get(name, []) for name in (TIMESTEPS, SAMPLE_LOSSES, IMAGE_NUMBERS)]
    return row if all(isinstance(item, list) for item in lists) else None


def is_image_number(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_STEP


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and -MAX_METRIC < value < MAX_METRIC


@dataclass(frozen=True, kw_only=True)
class LevelLoss:
    """A tenth of the timesteps: mean loss of its samples in the first and in the last third of the steps."""

    low: int
    high: int
    early: float  # nan where there is no sample
    early_count: int
    late: float
    late_count: int


def loss_by_level(curves: Curves) -> Sequence[LevelLoss]:
    """Loss by noise level; empty where no line has samples, or all are of one step."""
    steps = np.asarray(curves.level_steps, dtype=np.int64)
    if len(steps) == 0 or steps[0] == steps[-1]:
        return ()
    bins = np.clip(np.asarray(curves.level_t) * LEVELS / 1000, 0, LEVELS - 1).astype(int)
    losses = np.asarray(curves.level_losses)
    first, third = int(steps[0]), (int(steps[-1]) - int(steps[0]) + 1) / 3
    early, late = steps < first + third, steps >= first + 2 * third
    width = 1000 // LEVELS
    levels: list[LevelLoss] = []
    for i in range(LEVELS):
        in_bin = bins == i
        before, count_before = mean_and_count(losses[in_bin & early])
        after, count_after = mean_and_count(losses[in_bin & late])
        levels.append(
            LevelLoss(
                low=i * width, high=(i + 1) * width, early=before, early_count=count_before,
                late=after, late_count=count_after,
            )
        )  # fmt: skip
    return levels


def mean_and_count(values: np.ndarray) -> tuple[float, int]:
    return (float(values.mean()) if len(values) else math.nan), len(values)
