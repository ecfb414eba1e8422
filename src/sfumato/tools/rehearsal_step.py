"""The training step of a rehearsal, as the loop takes one."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from sfumato.train import train_step
from sfumato.training.follow import follow_step, settle
from sfumato.training.prefetch import prefetch
from sfumato.training.run import Run


def rehearse_step(run: Run) -> None:
    """As the loop takes one."""
    step = next(prefetch(run, 0))
    follow_step(run, step, train_step(run, step), run.method.after_step())
    run.ema.update()
    settle(run)


def take_step(run: Run, index: int, stage: AbstractContextManager[None]) -> None:
    """The same for one that is measured: looking at its numbers, which resets the device's own peak, is outside."""
    with stage:
        step = next(prefetch(run, index))
        result = train_step(run, step)
        curves = run.method.after_step()
        run.ema.update()
    follow_step(run, step, result, curves)
    settle(run)


def make_optimizer_state(run: Run) -> None:
    """Let the optimizer make its state, which from the second step on is there during forward and backward."""
    for parameter in run.all_parameters:
        parameter.grad = torch.zeros_like(parameter)
    run.scaler.scale(torch.zeros((), device=run.device))  # makes its state, too
    run.scaler.unscale_(run.optimizer)
    run.take_optimizer_step(0, torch.ones((), dtype=torch.bool, device=run.device))
    run.scaler.update()
