"""Meetings of processes in torch's key-value store: they exchange small values and wait without limit."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.distributed.distributed_c10d import Store

from sfumato.parallel.base import ProcessFailed
from sfumato.parallel.liveness import Address, Lifeline, Watch

log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.1  # seconds between two looks at the store
FAREWELL = 10.0  # seconds that the main process, which may hold the store, stays for the others at the end
FAILED = "failed"


class Meetings:
    """The meetings of one process, numbered in the same order in all; whoever waits learns of a failure elsewhere."""

    def __init__(self, store: Store, *, rank: int, processes: int, main_host: str) -> None:
        self.store, self.rank, self.processes = store, rank, processes
        self.count = 0
        self.watch = Watch((), rank)
        self.lifeline = Lifeline(main_host, processes)
        with ExitStack() as undo:
            undo.callback(self.close)
            addresses: list[Address] = [(host, port) for host, port in self.exchange(self.lifeline.address)]
            self.watch = Watch(addresses, rank)
            self.exchange(None)  # from here on each is seen by all
            undo.pop_all()

    def exchange(self, value: Any) -> list[Any]:
        """Wait until every process is at this meeting; gives the values of all, by rank."""
        keys = [f"meeting {self.count} of {rank}" for rank in range(self.processes)]
        self._list_ended()
        with lost_store():
            self.store.set(keys[self.rank], json.dumps(value))
            self._wait(lambda: self.store.check(keys))
            values = [json.loads(self.store.get(key)) for key in keys]
            if self.count:  # nobody reads the one before any more
                self.store.delete_key(f"meeting {self.count - 1} of {self.rank}")
        self.count += 1
        return values

    def announce_failure(self) -> None:
        """Whoever waits at a meeting, now or later, ends with ProcessFailed."""
        self._list_ended()
        with lost_store():
            self.store.set(FAILED, str(self.rank))

    def has_audience(self) -> bool:
        """Whether a process may still come to what this one takes part in; all others have left where not."""
        ended = self._list_ended()
        others = [rank for rank in range(self.processes) if rank != self.rank]
        with lost_store():
            return not all(rank in ended or self.store.check([left_key(rank)]) for rank in others)

    def find_failure(self) -> ProcessFailed | None:
        """That of another process which has failed or ended, if there is one."""
        ended = self._list_ended()
        with lost_store():
            return self._find_failure(ended)

    def leave(self) -> None:
        """The end of all: the process that may hold the store goes last."""
        self.exchange(None)
        with lost_store():
            self.store.set(left_key(self.rank), "")
            deadline = time.monotonic() + FAREWELL
            while self.rank == 0 and self.has_audience() and time.monotonic() < deadline:
                time.sleep(FIRST_PAUSE)

    def close(self) -> None:
        self.watch.close()
        self.lifeline.close()

    def _wait(self, over: Callable[[], bool]) -> None:
        """Until `over()`, looking now and then, so that signals are received."""
        pause = FIRST_PAUSE
        while not self._is_over(over):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _is_over(self, over: Callable[[], bool]) -> bool:
        """One look. A process that has ended may have come here, or announced why it ends, before that."""
        ended = self._list_ended()
        if over():
            return True
        failure = self._find_failure(ended)
        if failure is not None:
            self.store.set(left_key(self.rank), "")
            raise failure
        return False

    def _find_failure(self, ended: list[int]) -> ProcessFailed | None:
        failed = self.store.get(FAILED).decode() if self.store.check([FAILED]) else ""
        if failed or ended:
            return make_failed_error(int(failed)) if failed else make_lost_error(ended[0])
        return None

    def _list_ended(self) -> list[int]:
        """The ranks of processes that have ended, before the store is asked.

        ProcessFailed where that is process 0: the store may have been there, of whose loss torch speaks at length.
        """
        ended = self.watch.list_ended()
        if 0 in ended:
            raise make_lost_error(0)
        return ended


SEE_OTHERS = "its own last message says why; --debug shows what this process saw"


def make_failed_error(rank: int) -> ProcessFailed:
    return ProcessFailed(f"process {rank} of this run has failed", code="process-failed", fix=SEE_OTHERS)


def make_lost_error(rank: int) -> ProcessFailed:
    return ProcessFailed(f"process {rank} of this run has ended", code="process-lost", fix=SEE_OTHERS)


def left_key(rank: int) -> str:
    return f"left {rank}"


@contextmanager
def lost_store() -> Iterator[None]:
    """Turn the loss of the store, whose process has ended, into ProcessFailed."""
    try:
        yield
    except RuntimeError as error:  # torch's own errors of stores are of this class
        raise ProcessFailed("another process of this run has ended", code="process-ended", fix=SEE_OTHERS) from error
