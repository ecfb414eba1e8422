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
from sfumato.track.trackers import Tracker

log = logging.getLogger(__name__)
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Journal:
    """Reads each step's loss one step late, so that telling of it never waits for the device."""

    def __init__(self, trackers: Sequence[Tracker], progress: Progress, *, window: int) -> None:
        self.trackers, self.progress = list(trackers), progress
        self.window = window  # steps of an epoch: what loss/average runs over
        self.losses: deque[float] = deque(maxlen=window)
        self.waiting: tuple[int, Tensor, Mapping[str, float], Mapping[str, Tensor]] | None = None

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

    def note(self, step: int, loss: Tensor, rates: Mapping[str, float], more: Mapping[str, Tensor] = NOTHING) -> None:
        """After a step, counted from 1; `rates` by parameter group, `more` by the names of their curves."""
        self.flush()
        self.waiting = (step, loss, rates, more)

    def flush(self) -> None:
        """Write what waits; before anything is saved, so that a state knows every loss."""
        if self.waiting is None:
            return
        step, loss, rates, more = self.waiting
        self.waiting = None
        current = float(loss)
        if math.isfinite(current):  # steps that were left out have no part in the average
            self.losses.append(current)
        average = sum(self.losses) / max(1, len(self.losses))
        values = {"loss/current": current, "loss/average": average}
        if step % self.window == 0:
            values["loss/epoch_average"] = average
        values |= {f"lr/{name}": rate for name, rate in rates.items()}
        values |= {name: float(value) for name, value in more.items()}
        for tracker in list(self.trackers):
            self._tell(tracker, step, values)
        self.progress.advance(step, average, max(rates.values(), default=0.0))

    def _tell(self, tracker: Tracker, step: int, values: Mapping[str, float]) -> None:
        """A tracker that can no longer write is left out; training goes on."""
        try:
            tracker.log(step, values)
        except OSError as error:
            log.warning("%s cannot be written any more: %s", type(tracker).__name__, error)
            self.trackers.remove(tracker)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.extend(state.get("losses", []))
