"""Losses and rates, from the step to the terminal and the curves."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType, TracebackType
from typing import Any, Self

from torch import Tensor

from sfumato.track.progress import Progress
from sfumato.track.report import Report
from sfumato.track.report_curves import SAMPLES, TIMESTEPS
from sfumato.track.trackers import Tracker, Value

log = logging.getLogger(__name__)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
Samples = Sequence[tuple[Tensor, Tensor]]  # t and loss of each sample, (B,) for every micro-batch


class Journal:
    """Reads each step's loss one step late, so that telling of it never waits for the device."""

    def __init__(
        self, trackers: Sequence[Tracker], progress: Progress, *, window: int, report: Report | None = None
    ) -> None:
        self.trackers, self.progress, self.report = list(trackers), progress, report
        self.window = window  # steps of an epoch: what loss/average runs over
        self.losses: deque[float] = deque(maxlen=window)
        self.waiting: tuple[int, Tensor, Mapping[str, float], Mapping[str, Tensor | float], Samples] | None = None

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        self.progress.__exit__(kind, error, trace)
        for tracker in self.trackers:
            with suppress(OSError):  # told when it was written
                tracker.close()
        if self.report:
            self.report.close(error, total=self.progress.total)

    def note(
        self,
        step: int,
        loss: Tensor,
        rates: Mapping[str, float],
        more: Mapping[str, Tensor] = NOTHING,
        samples: Samples = (),
    ) -> None:
        """After a step, counted from 1; `rates` by parameter group, `more` by the names of their curves."""
        self.flush()
        self.waiting = (step, loss, rates, more, samples)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """What was measured after this step; it goes with the step's own numbers, or alone before the first."""
        if self.waiting is not None and self.waiting[0] == step:
            _, loss, rates, more, samples = self.waiting
            self.waiting = (step, loss, rates, {**more, **values}, samples)
            return
        self.flush()
        for tracker in list(self.trackers):
            self._tell(tracker, step, values)

    def publish(self) -> None:
        """After something was saved or drawn: bring the report up to date."""
        self.flush()
        if self.report:
            self.report.publish()

    def flush(self) -> None:
        """Write what waits; before anything is saved, so that a state knows every loss."""
        if self.waiting is None:
            return
        step, loss, rates, more, samples = self.waiting
        self.waiting = None
        current = float(loss)
        if math.isfinite(current):  # steps that were left out have no part in the average
            self.losses.append(current)
        average = sum(self.losses) / max(1, len(self.losses))
        values: dict[str, Value] = {"loss/current": current, "loss/average": average}
        if step % self.window == 0:
            values["loss/epoch_average"] = average
        values |= {f"lr/{name}": rate for name, rate in rates.items()}
        values |= {name: float(value) for name, value in more.items()}
        values |= lists(samples)
        for tracker in list(self.trackers):
            self._tell(tracker, step, values)
        self.progress.advance(step, average, max(rates.values(), default=0.0))
        if self.report:
            self.report.advance(step, self.progress.seconds_per_step)

    def _tell(self, tracker: Tracker, step: int, values: Mapping[str, Value]) -> None:
        """A tracker that can no longer write is left out; training goes on."""
        try:
            tracker.log(step, values)
        except OSError as error:
            log.warning("%s cannot be written any more, training goes on without it: %s", type(tracker).__name__, error)
            self.trackers.remove(tracker)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.extend(state.get("losses", []))


def lists(samples: Samples) -> dict[str, list[float]]:
    """This process's samples in a line of the journal file, in few digits; fillers, whose loss is nan, are left out."""
    pairs = [pair for t, loss in samples for pair in zip(t.tolist(), loss.tolist(), strict=True)]
    known = [(round(t, 1), float(f"{loss:.4g}")) for t, loss in pairs if math.isfinite(loss)]
    return {TIMESTEPS: [t for t, _ in known], SAMPLES: [loss for _, loss in known]} if known else {}
