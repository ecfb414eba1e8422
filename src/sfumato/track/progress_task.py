"""Progress of a long task: a bar with its speed on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sfumato.track.console import terminal
from sfumato.track.progress import LINE_SECONDS, REFRESH_RATE, format_duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)


class ProgressTask:
    """Counts the finished items of one task; shows nothing where it ends at once."""

    def __init__(
        self,
        label: str,
        unit: str,
        *,
        plain: bool = False,
        visible: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.unit, self.visible, self.clock = label, unit, visible, clock
        self.on_terminal = visible and not plain and sys.stderr.isatty()
        self.bar: Bar | None = None
        self.start_time = self.line_time = clock()

    def __enter__(self) -> Self:
        self.start_time = self.line_time = self.clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Call after each item."""
        now = self.clock()
        speed = done / max(now - self.start_time, 1e-9)
        facts = f"{speed:.1f} {self.unit} per second"
        if self.on_terminal:
            bar = self._bar(total)
            bar.update(bar.task_ids[0], completed=done, total=total, facts=facts)
        elif self.visible and now - self.line_time >= LINE_SECONDS:
            self.line_time = now
            log.info(
                "%s: %d of %d, %s, %s left", self.label, done, total, facts, format_duration((total - done) / speed)
            )

    def _bar(self, total: int) -> Bar:
        if self.bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = Bar(*columns, console=terminal(), refresh_per_second=REFRESH_RATE)
            self.bar.add_task(self.label, total=total, facts="")
            self.bar.start()
        return self.bar
