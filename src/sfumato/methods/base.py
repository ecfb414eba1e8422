"""The contract of training methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.common.registry import Registry
from sfumato.data.batch import Extras, Tensors
from sfumato.families.base import Blueprint, Family
from sfumato.optim.groups import ParameterGroup


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a method would train in one part, told before any weight is read."""

    part: str
    modules: int
    parameters: int
    learning_rate: float


class Method(Protocol):
    """What is trained."""

    kind: str  # what modelspec.architecture says after the model's name: "/lora", "" for a whole model
    reader: str  # the option of `sfumato generate` that takes what `write` has written
    modules: nn.ModuleDict  # all that trains; out of training mode while previews are made
    live_text: frozenset[str]  # encoders that train and so may not be cached

    def plan(self, blueprint: Blueprint) -> list[Planned]:
        """What `prepare` will train, from the checkpoint's headers."""
        ...

    def own_weights(self, blueprint: Blueprint) -> Collection[str]:
        """The networks whose own weights train; they are loaded in float32, or in bfloat16 with --full_bf16."""
        ...

    def prepare(self, model: Family) -> list[ParameterGroup]:
        """Freeze, thaw, attach; a family without the needed slot is a UserError that lists those with it."""
        ...

    def caption(self, text: str) -> str: ...

    def before_step(self, step: int) -> None:
        """Before the optimizer step with this index, counted from 0 over all resumed runs."""
        ...

    def begin(self, model: Family, extras: Extras) -> None:
        """Before text is encoded; sets state that stays until the next begin, so recomputation in backward meets it."""
        ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor: ...

    def without(self) -> AbstractContextManager[None]:
        """The model as it was before training; UserError at once where that is gone."""
        ...

    def after_step(self) -> Mapping[str, Tensor]:
        """After each optimizer step; series name -> value for the curves, 0-d and on the device."""
        ...

    def state(self) -> Tensors:
        """What training has changed, and `load_state` brings back."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of a saved state; UserError where they are of other parts or layers."""
        ...

    def metadata(self) -> Mapping[str, Any]:
        """The ss_ keys that only this method's files have, plain values."""
        ...

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        """About how many bytes `write` will write."""
        ...

    def ending(self, blueprint: Blueprint) -> str:
        """What follows a save's name: ".safetensors", or nothing where it is a folder."""
        ...

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        """The output, whole or not at all. dtype: of its floating-point tensors; None keeps them as they are."""
        ...

    def report(self) -> list[str]:
        """After the first step: what was asked to train and did not."""
        ...


METHODS: Registry[type] = Registry("training method")
