"""Schedule-free optimizers train on one set of weights and stand for another, their running average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch.optim import Optimizer


@runtime_checkable
class Averaging(Protocol):
    """What a schedule-free optimizer offers besides its steps (Defazio et al. 2024)."""

    def train(self) -> None:
        """Put the weights in place on which gradients are taken."""
        ...

    def eval(self) -> None:
        """Put the average in place: what is worth saving, sampling from and validating."""
        ...


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """For a while the weights are what the optimizer stands for; nothing changes for other optimizers.

    Going to the average and back rounds, and training would notice, so the weights wait in main memory and come back
    bit for bit.
    """
    if not isinstance(optimizer, Averaging):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    waiting = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, weights in zip(parameters, waiting, strict=True):
                parameter.copy_(weights)
