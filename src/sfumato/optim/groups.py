"""Parameters that share a learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """A parameter group of the optimizer."""

    name: str  # in logs and reports
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    decays: bool = True  # whether the optimizer's weight decay applies
