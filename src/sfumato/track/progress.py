"""Progress of training: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sfumato.track.console import terminal

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)
LINE_SECONDS = 10.0  # between two lines without a terminal, or a tenth of the run if that is sooner
REFRESH_RATE = 4.0  # of the bar, per second
RECENT_STEPS = 50  # over which the speed is measured


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one step, or of recent ones."""

    seconds: float = 0.0  # for a step, with the wait for its data
    images: float = 0.0  # in a step, of all processes
    peak_memory: int | None = None  # bytes; None where the device does not count them

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        memory = "" if self.peak_memory is None else f"  peak {self.peak_memory / 1e9:.1f} GB"
        return f"{self.seconds:.2f} s/it  {self.images_per_second:.3g} images/s{memory}"


class Progress:
    """Shows step, loss, learning rate, seconds per step and time left; takes plain numbers, so it never waits."""

    def __init__(
        self,
        total: int,
        start: int,
        *,
        plain: bool,
        visible: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.clock = total, clock
        self.last = self.line_step = start
        self.speeds: deque[Speed] = deque(maxlen=RECENT_STEPS)  # of each recent step
        self.now = self.line_time = clock()
        self.bar = _bar(total, start) if visible and not plain and sys.stderr.isatty() else None
        self.lines = visible and self.bar is None

    def __enter__(self) -> Self:
        self.now = self.line_time = self.clock()
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int, loss: float, lr: float, speed: Speed) -> None:
        """Call after a step, counted from 1; `loss` is the average, `speed` that of the step."""
        self.speeds.append(speed)
        self.now, self.last = self.clock(), step
        if not self.bar and not self._due():
            return
        recent = self.speed
        left = format_duration(recent.seconds * (self.total - step))
        facts = f"loss {loss:.4f}  lr {lr:.2e}  {recent}  {left} left"
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, facts=facts)
        else:
            log.info("step %d of %d  %s", step, self.total, facts)

    @property
    def speed(self) -> Speed:
        """Of the recent steps: medians, and the highest peak of memory."""
        if not self.speeds:
            return Speed()
        peaks = [speed.peak_memory for speed in self.speeds if speed.peak_memory is not None]
        return Speed(
            seconds=statistics.median(speed.seconds for speed in self.speeds),
            images=statistics.median(speed.images for speed in self.speeds),
            peak_memory=max(peaks, default=None),
        )

    def _due(self) -> bool:
        """Whether a line is due; the last step always has one."""
        waited, steps = self.now - self.line_time, self.last - self.line_step
        tenth = self.last * 10 // self.total > self.line_step * 10 // self.total
        due = self.last == self.total or (steps > 1 and (waited >= LINE_SECONDS or (tenth and waited >= 1)))
        if due and self.lines:
            self.line_time, self.line_step = self.now, self.last
        return due and self.lines


def _bar(total: int, start: int) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    bar = Bar(*columns, console=terminal(), refresh_per_second=REFRESH_RATE)
    bar.add_task("training", total=total, completed=start, facts="")
    return bar


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
