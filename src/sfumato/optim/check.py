"""Everything about optimizer and learning-rate schedule that can be wrong before weights are read."""

from __future__ import annotations

from collections.abc import Collection

from sfumato.config import OptimOptions
from sfumato.errors import Problems
from sfumato.optim.lr_schedule import check_schedule, describe_schedule
from sfumato.optim.optimizers import check_saved_class, try_optimizer


def check_optimizer(
    optim: OptimOptions,
    steps: int,
    problems: Problems,
    learning_rates: Collection[float] = (),
    *,
    saved_class: str = "",
) -> list[str]:
    """Add what cannot work to the problems; gives what the user should know of the rest.

    steps: of the schedule; 0 where nobody knows them. learning_rates: of the parts that train, where known.
    saved_class: of the optimizer in a state to resume from.
    """
    optimizer, notes = None, []
    with problems.catch():
        optimizer = try_optimizer(optim)
        if saved_class:
            check_saved_class(optimizer, saved_class)
    with problems.catch():
        if steps:
            check_schedule(optim, steps, optimizer, learning_rates)
            notes += describe_schedule(optim, steps)
    return notes
