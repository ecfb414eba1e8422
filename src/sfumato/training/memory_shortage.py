"""Where the memory does not suffice for what surrounds training: it is said once, and training goes on without."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from sfumato.parallel.base import ParallelStrategy
from sfumato.track.guard import describe_any_error
from sfumato.training.run import Run

log = logging.getLogger(__name__)
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def run_within_memory(work: Callable[[], None], parallel: ParallelStrategy) -> str:
    """Do the work; gives an empty text, or what the memory did not suffice for. Nothing of the work is kept then.

    Where processes move together the others wait within the work, so that the error has to end them all.
    """
    if parallel.moves_together:
        work()
        return ""
    shortage = ""
    try:
        work()
    except OUT_OF_MEMORY as error:
        shortage = describe_any_error(error)
    if shortage:  # from here on the error is gone, and with it the tensors of the calls that it went through
        torch.cuda.empty_cache()
    return shortage


def give_up_where_short(run: Run, what: str, shortage: str) -> bool:
    """A meeting: whether the memory of any process was too small; then `what` ends in all of them, with a warning."""
    shortages = [text for text in run.parallel.exchange(shortage) if text]
    if shortages:
        run.given_up.add(what)
        log.warning("no further %s in this run: the memory does not suffice for it: %s", what, shortages[0])
    return bool(shortages)
