"""Ctrl-C and SIGTERM, however many signals one of them is: terminals and launchers both pass it on to a process."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED, INTERRUPTED_LINE = 130, "error: interrupted"  # exit code and last line
REPEAT_SECONDS = 1.0  # within which further signals belong to the first


@dataclass
class LastStop:
    """When this process was last asked to stop; shared by all handlers, of which one may follow another."""

    time: float = -math.inf  # of time.monotonic()

    def is_new(self) -> bool:
        """Whether the signal that has just come is more than a repetition."""
        now = time.monotonic()
        new = now - self.time >= REPEAT_SECONDS
        self.time = now if new else self.time
        return new


LAST_STOP = LastStop()


@contextmanager
def handle_stop_signals(handler: Callable[[], None]) -> Iterator[None]:
    """Inside, call `handler` when the process is asked to stop. Does nothing in threads, which get no signals."""

    def receive(number: int, frame: FrameType | None) -> None:
        if LAST_STOP.is_new():
            handler()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, receive) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def stop_blocked_calls() -> Iterator[None]:
    """Inside, the process can be stopped while a library waits without ever coming back to Python, where handlers run.

    Of a signal that is not handled within a second a thread learns through a pipe; it ends the process.
    """
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        yield
        return
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    over = threading.Event()

    def watch() -> None:
        number = os.read(receiver, 1)
        if number and number[0] in STOP_SIGNALS and not over.wait(REPEAT_SECONDS):
            sys.stderr.write(INTERRUPTED_LINE + "\n")
            sys.stderr.flush()
            os._exit(INTERRUPTED)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(sender)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(sender)  # which ends the thread's reading
        watcher.join()
        os.close(receiver)


def raise_interrupt() -> None:
    """The handler that ends a command."""
    raise KeyboardInterrupt


def exit_process(code: int) -> NoReturn:
    """End the process; a signal that comes meanwhile does not change the exit code."""

    def exit_now(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    for number in STOP_SIGNALS:
        signal.signal(number, exit_now)
    sys.exit(code)
