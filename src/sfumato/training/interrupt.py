"""Ctrl-C: the first asks for an orderly end after the same step in every process, the second ends at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sfumato.common.stop_signals import handle_stop_signals, raise_interrupt

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Interrupt:
    """Whether the user asked to stop, and whether all processes know."""

    requested: bool = False  # by a signal to this process
    shared: bool = False  # by a signal to any process, which all have learned with the same sum
    failure_shared: bool = False  # whether the others know that this process has failed

    def request(self) -> None:
        """The first time a wish; the second time it ends the program."""
        if self.requested:
            raise_interrupt()
        self.requested = True
        log.warning("stopping after this step and saving the state; once more to stop at once")


@contextmanager
def interruptible(interrupt: Interrupt) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a request that the loop reads between steps."""
    with handle_stop_signals(interrupt.request):
        yield
