"""Ctrl-C: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger(__name__)


@dataclass
class Interrupt:
    """Whether the user asked to stop."""

    requested: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Turn SIGINT and SIGTERM into a request that the loop reads between steps."""
    interrupt = Interrupt()

    def request_stop(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        log.warning("stopping after this step and saving the state; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield interrupt
        return
    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
