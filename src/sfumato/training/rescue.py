"""An error while training saves a state first, whatever raised it."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

import torch

from sfumato.training.all_reduce import Flags, ProcessFailed, sum_over_processes
from sfumato.training.run import Run
from sfumato.training.saving import save_state_folder

log = logging.getLogger(__name__)


class StateRescue:
    """Inside, an error lets the other processes know and saves the last complete step; then it goes its way."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):  # a second Ctrl-C ends at once
            return
        run = self.run
        known = run.interrupt.failure_shared or isinstance(error, ProcessFailed)
        if run.processes.num_processes > 1 and not known and run.step < run.plan.total_steps:
            with run.metrics.guard.survive("informing the other processes", then=""):
                announce_failure(run)
        if run.step > run.start.step:
            with run.metrics.guard.survive(f"saving the state after step {run.step}", then=""):
                save_rescued_state(run)
        if isinstance(error, ProcessFailed) and run.interrupt.requested:  # both were to end, the other was first
            raise KeyboardInterrupt from error


def announce_failure(run: Run) -> None:
    """Take part in the sum that the other processes wait for: without gradients, and with the flag of a failure."""
    run.optimizer.zero_grad(set_to_none=True)
    sum_over_processes(run.all_parameters, torch.zeros((), device=run.device), Flags(failed=True))


def save_rescued_state(run: Run) -> None:
    """The last complete step, or what is closest to it."""
    if not run.is_main:
        return
    folder = save_state_folder(run, run.step)
    inexact = " (inside a step: going on from it is not bit-identical)" if run.mid_step else ""
    log.warning("the state after step %d is saved%s; go on with: --resume %s", run.step, inexact, folder)
