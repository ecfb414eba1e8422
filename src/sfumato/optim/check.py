"""Everything about optimizer and learning-rate schedule that can be wrong before weights are read."""

from __future__ import annotations

from collections.abc import Collection

from sfumato.config import OptimOptions
from sfumato.errors import Problems
from sfumato.optim.lr_schedule import check_schedule, describe_schedule
from sfumato.optim.optimizers import try_optimizer


def check_optimizer(
    optim: OptimOptions, steps: int, problems: Problems, learning_rates: Collection[float] = ()
) -> list[str]:
    """Add what cannot work to the problems; gives what the user should know of the rest.

    steps: of the schedule; 0 where nobody knows them. learning_rates: of the parts that train, where known.
    """
    optimizer, notes = None, []
    with problems.catch():
        optimizer = try_optimizer(optim)
    with problems.catch():
        if steps:
            check_schedule(optim, steps, optimizer, learning_rates)
            notes += describe_schedule(optim, steps)
    return notes
