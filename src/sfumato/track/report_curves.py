"""The run's own journal file as curves: read on from where it was read before, thinned out, sorted by noise level."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

POINTS = 1000  # of a curve, at most
LEVELS = 10  # bins of t in 0 .. 1000
TIMESTEPS, SAMPLES = "timesteps", "loss/samples"  # the names of the lists in a line


class Curves:
    """Every series of a `.run.jsonl`, in memory; `read` takes in the whole lines that were added since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def read(self) -> None:
        """Nothing where there is no file. A torn line is passed over; one without its end waits for it."""
        if not self.path.is_file():
            return
        if self.path.stat().st_size < self.offset:
            self._forget()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            self._take(line)

    def xy(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a series where it has any."""
        values = np.asarray(self.series.get(name, ()), dtype=np.float64)
        steps = np.asarray(self.steps, dtype=np.float64)[: len(values)]
        known = np.isfinite(values)
        return steps[known], values[known]

    def lost(self) -> list[int]:
        """The steps whose loss was not finite."""
        return list(self.lost_steps)

    @property
    def last(self) -> int:
        return self.steps[-1] if self.steps else 0

    def _forget(self) -> None:
        self.offset = 0
        self.steps: array[int] = array("q")
        self.lost_steps: array[int] = array("q")
        self.series: dict[str, array[float]] = {}
        self.level_steps: array[int] = array("q")  # one entry for each sample
        self.level_t, self.level_losses = array("d"), array("d")

    def _take(self, line: bytes) -> None:
        row = parsed(line)
        if row is None:
            return
        step = row.pop("step")
        timesteps, losses = row.pop(TIMESTEPS, []), row.pop(SAMPLES, [])
        for t, loss in zip(timesteps, losses, strict=False):
            if is_number(t) and is_number(loss):
                self.level_steps.append(step)
                self.level_t.append(t)
                self.level_losses.append(loss)
        if not is_number(row.get("loss/current", 0.0)):
            self.lost_steps.append(step)
        for name, value in row.items():
            series = self.series.setdefault(name, array("d"))
            series.extend([math.nan] * (len(self.steps) - len(series)))
            series.append(value if is_number(value) else math.nan)
        self.steps.append(step)


def parsed(line: bytes) -> dict[str, Any] | None:
    """One line's row; None for anything else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    lists = (row.get(TIMESTEPS, []), row.get(SAMPLES, []))
    return row if all(isinstance(each, list) for each in lists) else None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def thinned(x: np.ndarray, y: np.ndarray, most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points: of each stretch its lowest and its highest, so that no peak is lost."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2 + 1).astype(int)
    kept: list[int] = []
    for start, end in pairwise(edges.tolist()):
        piece = y[start:end]
        low, high = start + int(piece.argmin()), start + int(piece.argmax())
        kept += sorted({low, high})
    return x[kept], y[kept]


@dataclass(frozen=True, kw_only=True)
class Level:
    """A tenth of the timesteps: mean loss of its samples in the first and in the last third of the steps."""

    low: int
    high: int
    early: float  # nan where there is no sample
    early_count: int
    late: float
    late_count: int


def by_level(curves: Curves) -> Sequence[Level]:
    """Loss by noise level; empty where no line tells of samples, or all are of one step."""
    steps = np.asarray(curves.level_steps, dtype=np.int64)
    if len(steps) == 0 or steps[0] == steps[-1]:
        return ()
    bins = np.clip(np.asarray(curves.level_t) * LEVELS / 1000, 0, LEVELS - 1).astype(int)
    losses = np.asarray(curves.level_losses)
    first, third = int(steps[0]), (int(steps[-1]) - int(steps[0]) + 1) / 3
    early, late = steps < first + third, steps >= first + 2 * third
    width = 1000 // LEVELS
    levels = []
    for i in range(LEVELS):
        there = bins == i
        (before, count_before), (after, count_after) = mean(losses[there & early]), mean(losses[there & late])
        levels.append(
            Level(
                low=i * width, high=(i + 1) * width, early=before, early_count=count_before,
                late=after, late_count=count_after,
            )
        )  # fmt: skip
    return levels


def mean(values: np.ndarray) -> tuple[float, int]:
    return (float(values.mean()) if len(values) else math.nan), len(values)
