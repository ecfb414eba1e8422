"""Everything about optimizer and learning-rate schedule that can be wrong before weights are read."""

from __future__ import annotations

from collections.abc import Collection

from torch.optim import Optimizer

from sfumato.config import OptimOptions
from sfumato.errors import Problems, UserError
from sfumato.optim.half_stepper import steps_each_parameter
from sfumato.optim.lr_schedule import check_schedule, describe_schedule
from sfumato.optim.optimizers import check_saved_class, try_optimizer


def check_fused_backward(optim: OptimOptions, optimizer: Optimizer) -> None:
    """Raise UserError where the optimizer cannot step one parameter after another."""
    if optim.fuses_backward and not steps_each_parameter(optimizer):
        raise UserError(
            f"{optim.optimizer} looks at all parameters together, and the fused backward pass steps one after another",
            code="fused-backward-optimizer",
            fix="give --optimizer_type AdamW, AdaFactor, AdamW8bit or Lion, or remove the option",
        )


def check_fused_processes(optim: OptimOptions, processes: int) -> None:
    """Raise UserError where gradients would have to be summed over processes before a step within backward."""
    if optim.fuses_backward and processes > 1:
        raise UserError(
            f"there are {processes} processes, which sum their gradients after backward; the fused backward pass has "
            "none left then",
            code="fused-backward-processes",
            fix="start one process, or remove the option",
        )


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
        check_fused_backward(optim, optimizer)
        if saved_class:
            check_saved_class(optimizer, saved_class)
    with problems.catch():
        if steps:
            check_schedule(optim, steps, optimizer, learning_rates)
            notes += describe_schedule(optim, steps)
    return notes
