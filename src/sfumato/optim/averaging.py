"""Evaluation weights of schedule-free optimizers, which train one set of weights and average them into another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer


@runtime_checkable
class ScheduleFreeOptimizer(Protocol):
    """The modes of a schedule-free optimizer (Defazio et al. 2024)."""

    def train(self) -> None:
        """Put the weights in place on which gradients are taken."""
        ...

    def eval(self) -> None:
        """Put the average in place, for saving, samples and validation."""
        ...


def list_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups, in order."""
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


@contextmanager
def cast_to_float32(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, parameters in bfloat16 are in float32."""
    low = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
    for parameter in low:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in low:
            parameter.data = parameter.data.to(torch.bfloat16)


@contextmanager
def eval_weights(optimizer: Optimizer) -> Iterator[None]:
    """Within, the weights of a schedule-free optimizer are their average; other optimizers change nothing.

    Switching to the average and back rounds, which would change training, so the weights are copied to main memory and
    restored bit for bit. Weights in bfloat16 are averaged in float32, the dtype of the optimizer's state, and rounded.
    """
    if not isinstance(optimizer, ScheduleFreeOptimizer):
        yield
        return
    parameters = list_parameters(optimizer)
    copies = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    with cast_to_float32(parameters):
        optimizer.eval()
    try:
        yield
    finally:
        with cast_to_float32(parameters):
            optimizer.train()
        with torch.no_grad():
            for parameter, weights in zip(parameters, copies, strict=True):
                parameter.copy_(weights)
