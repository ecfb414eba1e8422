"""Parameters that share a learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """`name` is what logs and reports show."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    decays: bool = True  # whether the optimizer's weight decay is meant for it
