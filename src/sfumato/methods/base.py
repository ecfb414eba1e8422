"""The interface of training methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sfumato.common.registry import Registry
from sfumato.data.batch import Extras, Tensors
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.optim.groups import ParameterGroup


@dataclass(frozen=True, kw_only=True)
class TrainablePart:
    """What a method would train in one part; known before any weight is read."""

    part: str
    modules: int
    parameters: int
    learning_rate: float
    reads_weights: bool = False  # whether it is made from the frozen weights that it changes


class PlanNotes(NamedTuple):
    """Lines for the report before the first step."""

    notes: tuple[str, ...] = ()  # options without the effect that they seem to have; errors with --strict
    remarks: tuple[str, ...] = ()  # facts that are no fault


class Method(Protocol):
    """What is trained, how it is saved, and the model's prediction with it."""

    modelspec_suffix: str  # follows the model's name in modelspec.architecture: "/lora", "" for a whole model
    modules: nn.ModuleDict  # everything that trains; in eval mode while samples are made
    live_text: frozenset[str]  # encoders that train and so may not be cached; known once the plan is made

    def extend(self, family: type[Family], blueprint: Blueprint) -> Blueprint:
        """The blueprint with what the method adds to the model; called before `plan`."""
        ...

    def plan(self, blueprint: Blueprint) -> list[TrainablePart]:
        """What `prepare` will train, from the checkpoint's headers. Raises UserError for options that do not match."""
        ...

    def list_notes(self, blueprint: Blueprint) -> PlanNotes:
        """What there is to say of the options that `plan` has read; called after it."""
        ...

    def full_precision_parts(self, blueprint: Blueprint) -> Collection[str]:
        """The networks whose own weights train; in float32, or as --full_bf16 or --full_fp16 say."""
        ...

    def change_frozen(self, model: Family) -> None:
        """Register what changes the weights of frozen networks, before any is read (`Part.changes`)."""
        ...

    def prepare(self, model: Family) -> list[ParameterGroup]:
        """Make trainable what trains, and return the optimizer's parameter groups. Those networks are loaded."""
        ...

    def rewrite_caption(self, text: str) -> str:
        """A caption as it is encoded."""
        ...

    def before_step(self, step: int) -> None:
        """Called before the optimizer step with this index, counted from 0 over all resumed runs."""
        ...

    def set_batch(self, model: Family, extras: Extras) -> None:
        """Called before text is encoded; what it sets stays until the next call, as recomputation needs it."""
        ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor: ...

    def disabled(self) -> AbstractContextManager[None]:
        """A context with the model as it was before training; UserError at once where it no longer exists."""
        ...

    def sampling(self) -> AbstractContextManager[None]:
        """A context in which images are made; what takes part without being trained may differ there."""
        ...

    def list_frozen(self) -> Sequence[nn.Module]:
        """What takes part beside the networks without being trained, of those that are loaded."""
        ...

    def list_generate_options(self, file: str, blueprint: Blueprint) -> Mapping[str, object]:
        """The options of `sfumato generate` for a file that `write` wrote; empty for the model before training."""
        ...

    def after_step(self) -> Mapping[str, Tensor]:
        """Called after each optimizer step; metric -> value, 0-d and on the device."""
        ...

    def state_dict(self) -> Tensors:
        """The trained weights, for a saved state."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of a saved state; UserError where they are of other parts or layers."""
        ...

    def metadata(self) -> Mapping[str, Any]:
        """The ss_ keys that only this method's files have, plain values."""
        ...

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        """About how many bytes `write` writes."""
        ...

    def file_suffixes(self, blueprint: Blueprint) -> Sequence[str]:
        """The ends of the names of what `write` writes: ".safetensors", or nothing for a folder; the output first,
        then the files beside it."""
        ...

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        """Write the output, complete or not at all, after the files beside it, which begin with its name.

        dtype: of floating-point tensors; None keeps theirs.
        """
        ...

    def report(self) -> list[str]:
        """Called after the first step; a line for each fault, e.g. weights that should train and got no gradient."""
        ...


METHODS: Registry[type] = Registry("training method")
