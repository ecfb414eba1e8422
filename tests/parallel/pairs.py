"""Two processes of a run as two threads, whose store is in memory and whose sums meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed import HashStore

from sfumato.errors import UserError
from sfumato.parallel.all_reduce import AllReduce
from sfumato.parallel.meeting import Meetings

TIMEOUT = 20.0  # seconds until a test counts as hanging


class Adder:
    """Sums tensors of two threads, in place."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=TIMEOUT)
        self.tensors: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> None:
        self.tensors.append(tensor.clone())
        self.barrier.wait()
        tensor.copy_(self.tensors[0] + self.tensors[1])
        if self.barrier.wait() == 0:
            self.tensors.clear()
        self.barrier.wait()


def run_both(act: Callable[[int], Any]) -> list[Any]:
    """act(rank) in two threads; gives the result of each, or the error that it raised."""

    def caught(rank: int) -> Any:
        try:
            return act(rank)
        except (UserError, ValueError, RuntimeError, TypeError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(caught, rank) for rank in range(2)]
        return [future.result(timeout=TIMEOUT) for future in futures]


def meet_both(act: Callable[[Meetings], Any]) -> list[Any]:
    """act(meetings) in both; an error in one is announced, so that the other does not wait."""
    store = HashStore()
    both: list[Meetings] = []  # until both are done: whoever is gone counts as dead

    def meet(rank: int) -> Any:
        meetings = Meetings(store, rank=rank, processes=2, main_host="127.0.0.1")
        both.append(meetings)
        done = False
        try:
            result = act(meetings)
            done = True
            return result
        finally:
            if not done:
                meetings.announce_failure()

    found = run_both(meet)
    for meetings in both:
        meetings.close()
    return found


def run_strategies(act: Callable[[AllReduce], Any]) -> list[Any]:
    """act(strategy) in both, on the CPU."""
    return meet_both(lambda meetings: act(AllReduce(meetings, torch.device("cpu"))))
