"""The contract of training methods."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from sfumato.data.batch import Extras, Tensors
from sfumato.families.base import Blueprint, Family
from sfumato.optim.groups import ParameterGroup
from sfumato.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a method would train in one part, told before any weight is read."""

    part: str
    modules: int
    parameters: int
    learning_rate: float


class Method(Protocol):
    """What is trained."""

    modules: nn.ModuleDict  # all that this method added; saved by state
    live_text: frozenset[str]  # encoders that train and so may not be cached

    def plan(self, blueprint: Blueprint) -> list[Planned]:
        """What `prepare` will train, from the checkpoint's headers."""
        ...

    def prepare(self, model: Family) -> list[ParameterGroup]:
        """Freeze, thaw, attach; a family without the needed slot is a UserError that lists those with it."""
        ...

    def caption(self, text: str) -> str: ...

    def begin(self, model: Family, extras: Extras) -> None:
        """Before text is encoded; sets state that stays until the next begin, so recomputation in backward meets it."""
        ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor: ...

    def without(self) -> AbstractContextManager[None]:
        """The model as it was before training."""
        ...

    def after_step(self) -> Mapping[str, Tensor]:
        """After each optimizer step; series name -> value for the curves, 0-d and on the device."""
        ...

    def state_to_save(self) -> Tensors:
        """The entries of the output file."""
        ...

    def report(self) -> list[str]:
        """After the first step: what was asked to train and did not."""
        ...


METHODS: Registry[type] = Registry("training method")
