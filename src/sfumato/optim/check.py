"""Everything about optimizer and learning-rate schedule that can be wrong before weights are read."""

from __future__ import annotations

from sfumato.config import OptimOptions
from sfumato.errors import Problems
from sfumato.optim.lr_schedule import check_schedule
from sfumato.optim.optimizers import choose_optimizer


def check_optimizer(optim: OptimOptions, steps: int, problems: Problems) -> None:
    """steps: of the schedule; 0 where nobody knows them."""
    with problems.catch():
        choose_optimizer(optim)
    with problems.catch():
        if steps:
            check_schedule(optim, steps)
