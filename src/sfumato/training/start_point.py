"""Where a run begins: at step 0, where a saved state ends, or at the step that --initial_step or --initial_epoch names.

A run knows three places, which are usually the same: what its next step is called (files, curves, moments to save,
captions that change with the steps), how far it is in the data, and how far in the schedule of learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sfumato.config import Config
from sfumato.data.plans import DataPlan
from sfumato.plan import named_step


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """In optimizer steps."""

    step: int = 0  # called done before the first one
    data: int = 0  # what the step with the first data is called, or would be
    schedule: int = 0  # the same of the first step of the learning rates

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Of a state that goes on, {} for a fresh run; states of runs that began at 0 need not say so."""
        return cls(step=state.get("step", 0), **state.get("began", {}))

    def state(self) -> dict[str, int]:
        """What a later state needs besides its step."""
        return {"data": self.data, "schedule": self.schedule}


def beginning(config: Config, data: DataPlan, state: Mapping[str, Any]) -> Beginning:
    """--initial_step gives the next step another name; data and rates go on where they were, unless
    --skip_until_initial_step asks for the data of that step.
    """
    saved, named = Beginning.of(state), named_step(config, data)
    if named is None:
        return saved
    moved = named - saved.step
    whose = 0 if config.loop.skip_until_initial_step else saved.data + moved
    return Beginning(step=named, data=whose, schedule=saved.schedule + moved)


def told(begun: Beginning) -> str:
    """One line for a run that begins elsewhere than its data or its learning rates."""
    data = f"with the data of step {begun.step - begun.data + 1}"
    rates = f"the learning rates stand at their step {begun.step - begun.schedule + 1}"
    return f"the next step is called {begun.step + 1}; it goes on {data}, and {rates}"
