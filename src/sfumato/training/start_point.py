"""Where a run starts: at step 0, where a saved state ends, or at the step that --initial_step or --initial_epoch names.

A run has three positions, which are usually the same: the number of its next step (files, curves, when to save,
captions that change with the steps), its position in the data, and its position in the learning-rate schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sfumato.config import Config
from sfumato.data.plans import DataPlan
from sfumato.plan import requested_first_step

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """In optimizer steps."""

    step: int = 0  # that count as done before the first one
    data: int = 0  # the number of the step with the first data
    schedule: int = 0  # the number of the first step of the learning-rate schedule

    def counters(self, step: int) -> dict[str, int]:
        """What a state saved after `step` keeps, from which a resumed run starts."""
        return {**asdict(self), "step": step}


def find_start_point(config: Config, data: DataPlan, counters: Mapping[str, int]) -> StartPoint:
    """--initial_step gives the next step another number; data and learning rates go on where they were, unless
    --skip_until_initial_step asks for the data of that step.

    counters: of the saved state, {} for a fresh run.
    """
    saved, first = StartPoint(**counters), requested_first_step(config, data)
    if first is None:
        return saved
    moved = first - saved.step
    data_start = 0 if config.loop.skip_until_initial_step else saved.data + moved
    return StartPoint(step=first, data=data_start, schedule=saved.schedule + moved)


def describe_end(start: StartPoint, total: int) -> str:
    """One line for a run that has no step left."""
    return f"nothing left to do: training was complete at step {start.step} of {total}"


def describe_start(start: StartPoint) -> str:
    """One line for a run that starts elsewhere than its data or its learning-rate schedule."""
    data = f"with the data of step {start.step - start.data + 1}"
    schedule = f"the learning-rate schedule is at its step {start.step - start.schedule + 1}"
    return f"the next step has number {start.step + 1}; it goes on {data}, and {schedule}"


def has_steps_left(total: int, start: StartPoint, saved: StartPoint) -> bool:
    """Whether training goes on from `start`; says where, if that is not where the saved state ends."""
    if start.step >= total:
        log.info("%s", describe_end(start, total))
        return False
    if start != saved:
        log.warning("%s", describe_start(start))
    return True
