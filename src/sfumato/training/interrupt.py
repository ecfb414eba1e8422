"""Ctrl-C: the first asks for an orderly end after the same step in every process, the second ends at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sfumato.common.stop_signals import handle_stop_signals
from sfumato.parallel.base import ParallelStrategy

log = logging.getLogger(__name__)


@contextmanager
def interruptible(parallel: ParallelStrategy) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a request that the loop reads between steps."""

    def request_stop() -> None:
        parallel.request_stop()
        log.warning("stopping after this step and saving the state; once more to stop at once")

    with handle_stop_signals(request_stop):
        yield
