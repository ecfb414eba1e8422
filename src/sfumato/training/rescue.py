"""An error while training saves a state first, whatever raised it."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from sfumato.parallel.base import ProcessFailed
from sfumato.training.nonfinite import check_finite_weights, find_nonfinite_group
from sfumato.training.run import Run
from sfumato.training.saving import collect_state, state_folder, write_state_folder

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
        if not isinstance(error, ProcessFailed):
            with run.metrics.guard.survive("informing the other processes", then=""):
                run.parallel.announce_failure(run.all_parameters)
        if run.step > run.start.step:
            with run.metrics.guard.survive(f"saving the state after step {run.step}", then=""):
                save_rescued_state(run)
        if isinstance(error, ProcessFailed) and run.parallel.stop_requested:  # both were to end, the other was first
            raise KeyboardInterrupt from error


def save_rescued_state(run: Run) -> None:
    """The last complete step, or what is closest to it. The main process does not wait: the others may be gone."""
    if not run.parallel.is_main:
        return
    if run.parallel.shares_out_trained:
        log.warning("no state is saved: this process has only its rows of the weights; go on from the last that was")
        return
    run.metrics.flush()
    check_finite_weights([find_nonfinite_group(run.optimizer)], run.step)
    folder = state_folder(run, run.step)
    write_state_folder(run, collect_state(run, run.step), folder)
    inexact = " (inside a step: going on from it is not bit-identical)" if run.mid_step else ""
    log.warning("the state after step %d is saved%s; go on with: --resume %s", run.step, inexact, folder)
