"""How far training is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)
QUIET_SECONDS = 10.0  # at least so long between two lines where there is no terminal


class Progress:
    """Shows step, loss, rate, seconds per step and time left; reads python numbers only, so it never waits."""

    def __init__(self, total: int, start: int, *, plain: bool, visible: bool = True) -> None:
        self.total, self.start, self.done = total, start, start
        self.began = self.told = time.monotonic()
        self.bar = _bar(total, start) if visible and not plain and sys.stderr.isatty() else None
        self.lines = visible and self.bar is None

    def __enter__(self) -> Self:
        if self.bar:
            self.bar[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar[0].stop()

    def advance(self, step: int, loss: float, rate: float) -> None:
        """After a step; `loss` is the average that is worth showing."""
        self.done = step
        facts = f"loss {loss:.4f}  rate {rate:.2e}  {self.seconds_per_step:.2f} s/it"
        if self.bar:
            bar, task = self.bar
            bar.update(task, completed=step, facts=facts)
        elif self.lines and self._due():
            left = self.seconds_per_step * (self.total - step)
            log.info("step %d of %d  %s  %s left", step, self.total, facts, duration(left))

    @property
    def seconds_per_step(self) -> float:
        return (time.monotonic() - self.began) / max(1, self.done - self.start)

    def _due(self) -> bool:
        now = time.monotonic()
        if self.done == self.total or now - self.told >= QUIET_SECONDS:
            self.told = now
            return True
        return False


def _bar(total: int, start: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Bar(*columns, console=Console(stderr=True))
    return bar, bar.add_task("training", total=total, completed=start, facts="")


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
