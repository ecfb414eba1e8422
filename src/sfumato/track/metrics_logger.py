"""Logging of each step's metrics: to the trackers, the terminal and the report."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor

from sfumato.track.guard import Guard
from sfumato.track.progress import Progress, Speed
from sfumato.track.report import Report
from sfumato.track.report_curves import IMAGE_NUMBERS, SAMPLE_LOSSES, TIMESTEPS
from sfumato.track.trackers import Tracker, Value

REPORT = "writing the report"


class MicroBatchLosses(NamedTuple):
    """Of each sample, on the CPU."""

    t: Tensor  # (B,) in 0 .. 1000
    loss: Tensor  # (B,) before weighting; nan for padding samples
    image_numbers: Tensor | None = None  # (B,) int64, among the training images; -1 for any other


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What a step has given."""

    loss: float
    speed: Speed
    curves: Mapping[str, float] = field(default_factory=dict)  # further values by series name
    samples: Sequence[MicroBatchLosses] = ()


class Reading(Protocol):
    """A step's values that may still be on their way from the device."""

    def read(self) -> StepValues: ...


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The metrics of one step, counted from 1."""

    step: int
    reading: Reading
    learning_rates: Mapping[str, float]  # by parameter group
    measured: Mapping[str, float] = field(default_factory=dict)  # after the step, e.g. in validation


class MetricsLogger:
    """Logs each step one step late: its numbers are then there, while the device computes the next one."""

    def __init__(
        self,
        trackers: Sequence[Tracker],
        progress: Progress,
        *,
        window: int,
        report: Report | None = None,
        image_numbers: Sequence[int] = (),
    ) -> None:
        """window: steps of an epoch. image_numbers: of the training images in the run's list; () to log none."""
        self.trackers, self.progress, self.report, self.guard = tuple(trackers), progress, report, Guard()
        self.image_numbers = image_numbers
        self.window = window  # steps of an epoch, over which loss/average runs
        self.losses: deque[float] = deque(maxlen=window)
        self.pending: StepMetrics | None = None

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.guard.survive("writing the last metrics", then=""):
            self.flush()
        with self.guard.survive("showing the progress", then=""):
            self.progress.__exit__(kind, error, trace)
        for tracker in self.trackers:
            with self.guard.survive(describe_tracker(tracker), then=""):
                tracker.close()
        if self.report:
            with self.guard.survive(REPORT, then=""):
                self.report.close(error, total=self.progress.total)

    def log_step(self, step: int, reading: Reading, learning_rates: Mapping[str, float]) -> None:
        """Call after a step, counted from 1."""
        self.flush()
        self.pending = StepMetrics(step=step, reading=reading, learning_rates=learning_rates)

    def log_values(self, step: int, values: Mapping[str, float]) -> None:
        """What was measured after this step; joins the step's own metrics, or is written alone before the first."""
        if self.pending is not None and self.pending.step == step:
            self.pending = replace(self.pending, measured={**self.pending.measured, **values})
            return
        self.flush()
        self._write(step, values)

    def publish(self) -> None:
        """Call after something was saved or sampled: updates the report."""
        self.flush()
        if self.report:
            with self.guard.survive(REPORT):
                self.report.publish()

    def flush(self) -> None:
        """Write the pending step; before anything is saved, so that a state has every loss."""
        if self.pending is None:
            return
        metrics, self.pending = self.pending, None
        found = metrics.reading.read()
        current = found.loss
        if math.isfinite(current):  # skipped steps do not count in the average
            self.losses.append(current)
        average = sum(self.losses) / max(1, len(self.losses))
        values: dict[str, Value] = {"loss/current": current, "loss/average": average}
        if metrics.step % self.window == 0:
            values["loss/epoch_average"] = average
        values |= {f"lr/{name}": lr for name, lr in metrics.learning_rates.items()}
        values |= {**found.curves, **metrics.measured}
        values |= {**list_samples(found.samples, self.image_numbers), **list_speed(found.speed)}
        self._write(metrics.step, values)
        with self.guard.survive("showing the progress"):
            learning_rate = max(metrics.learning_rates.values(), default=0.0)
            self.progress.advance(metrics.step, average, learning_rate, found.speed)
        if self.report:
            with self.guard.survive(REPORT):
                self.report.advance(metrics.step, self.progress.speed)

    def _write(self, step: int, values: Mapping[str, Value]) -> None:
        """To every tracker; one that fails is tried again at the next step."""
        for tracker in self.trackers:
            with self.guard.survive(describe_tracker(tracker)):
                tracker.log(step, values)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.extend(state.get("losses", []))


def describe_tracker(tracker: Tracker) -> str:
    """What is done with it, for a warning."""
    return f"writing to {type(tracker).__name__}"


def list_speed(speed: Speed) -> dict[str, float]:
    """Its series, in few digits; that of memory where the device counts it."""
    values = {"speed/seconds_per_step": speed.seconds, "speed/images_per_second": speed.images_per_second}
    if speed.peak_memory is not None:
        values["memory/peak_gb"] = speed.peak_memory / 1e9
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def list_samples(samples: Sequence[MicroBatchLosses], numbers: Sequence[int]) -> dict[str, list[float]]:
    """This process's samples for the metrics file, in few digits, without padding samples, whose loss is nan.

    numbers: of the training images in the run's list; () where it has none.
    """
    timesteps: list[float] = []
    losses: list[float] = []
    images: list[float] = []
    for batch in samples:
        positions = [-1] * len(batch.t) if batch.image_numbers is None else batch.image_numbers.tolist()
        for timestep, value, position in zip(batch.t.tolist(), batch.loss.tolist(), positions, strict=True):
            if math.isfinite(value):
                timesteps.append(round(timestep, 1))
                losses.append(float(f"{value:.4g}"))
                images.append(numbers[position] if numbers and position >= 0 else -1)
    if not losses:
        return {}
    return {TIMESTEPS: timesteps, SAMPLE_LOSSES: losses, **({IMAGE_NUMBERS: images} if numbers else {})}
