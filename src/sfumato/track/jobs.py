"""How far a long job is: a bar with its speed on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sfumato.track.console import terminal
from sfumato.track.progress import QUIET_SECONDS, REDRAWS, duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)


class Job:
    """Counts what is done of one job. Nothing is shown of a job that is over at once."""

    def __init__(
        self,
        what: str,
        unit: str,
        *,
        plain: bool = False,
        visible: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.unit, self.visible, self.clock = what, unit, visible, clock
        self.on_terminal = visible and not plain and sys.stderr.isatty()
        self.bar: Bar | None = None
        self.began = self.told = clock()

    def __enter__(self) -> Self:
        self.began = self.told = self.clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """After each piece of work."""
        now = self.clock()
        speed = done / max(now - self.began, 1e-9)
        facts = f"{speed:.1f} {self.unit} a second"
        if self.on_terminal:
            bar = self._bar(total)
            bar.update(bar.task_ids[0], completed=done, total=total, facts=facts)
        elif self.visible and now - self.told >= QUIET_SECONDS:
            self.told = now
            log.info("%s: %d of %d, %s, %s left", self.what, done, total, facts, duration((total - done) / speed))

    def _bar(self, total: int) -> Bar:
        if self.bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = Bar(*columns, console=terminal(), refresh_per_second=REDRAWS)
            self.bar.add_task(self.what, total=total, facts="")
            self.bar.start()
        return self.bar
