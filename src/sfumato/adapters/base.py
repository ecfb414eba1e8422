"""The interface of adapters, and the engine that attaches them by forward hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.common.text import list_some
from sfumato.data.batch import Tensors
from sfumato.errors import InternalError
from sfumato.formats.groups import Layer, LayerGroup


class Adapter(nn.Module, ABC):
    """A change of the weights of one layer group; knows no family and no file name."""

    lora_plus_params: ClassVar[tuple[str, ...]] = ()  # parameters with the LoRA+ learning rate
    has_norm_limit: ClassVar[bool] = False  # whether `limit_norm` is implemented

    def __init__(self, group: LayerGroup) -> None:
        super().__init__()
        self._group = (group,)  # in a tuple: the layers are not this module's children

    @property
    def group(self) -> LayerGroup:
        return self._group[0]

    @abstractmethod
    def delta(self, i: int) -> Tensor:
        """The change of the i-th layer's weight at strength 1, in that weight's shape."""

    def forward(self, x: Tensor, i: int) -> Tensor:
        """The change of the i-th layer's output at strength 1; subclasses may avoid forming delta."""
        return apply_weight(self.group.layers[i], x, self.delta(i))

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        """The i-th layer's output for x with this change added, in the output's dtype.

        strength: one number, or (rows,), one for each row of the batch. Subclasses may save a pass over the output.
        """
        change = self(x, i).to(output.dtype)
        if isinstance(strength, Tensor):
            return output + change * per_row(strength, change)
        return torch.add(output, change, alpha=strength)

    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """Scale the parameters so that the change's norm is at most `maximum`; (norm now, whether it was larger).

        Both 0-d and on the device, so that nothing waits for it.
        """
        raise InternalError(f"{type(self).__name__} has no norm limit")

    @abstractmethod
    def export_tensors(self) -> Tensors:
        """File suffix -> tensor, e.g. lora_down.weight, alpha."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor]) -> Self:
        """The adapter that `tensors` were saved from; their sizes are those of the group."""


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(rows,) -> (rows, 1, ...) in the dtype and on the device of `like` (rows, ...)."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def apply_weight(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's operation with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)  # pyright: ignore


class AdapterEngine(nn.Module):
    """Attaches adapters by forward hooks; the networks' own modules and state dicts stay untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.multiplier: float | Tensor = 1.0  # (B,): rows of any layer's batch are sample-major
        self._names_run: set[str] = set()

    def __iter__(self) -> Iterator[Adapter]:
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield adapter

    def attach(self, groups: Sequence[LayerGroup], make: Callable[[LayerGroup], Adapter | None]) -> None:
        """Hook every group for which `make` returns an adapter."""
        for group in groups:
            adapter = make(group)
            if adapter is None:
                continue
            assert group.name not in self.adapters, f"the adapter name {group.name} is used twice"
            self.adapters[group.name] = adapter
            for i, layer in enumerate(group.layers):
                layer.register_forward_hook(partial(self._add, adapter, group.name, i))

    def _add(
        self, adapter: Adapter, name: str, i: int, layer: nn.Module, args: tuple[Tensor], output: Tensor
    ) -> Tensor:
        if not torch.compiler.is_compiling():  # a compiled graph with the name in it would serve this layer alone
            self._names_run.add(name)
        strength = self.multiplier
        if isinstance(strength, Tensor):
            return adapter.add_to(output, args[0], i, strength.repeat_interleave(output.shape[0] // strength.shape[0]))
        return output if strength == 0 else adapter.add_to(output, args[0], i, strength)

    @contextmanager
    def use_multiplier(self, multiplier: float | Tensor) -> Iterator[None]:
        """Another strength inside the block; only before the main forward, since recomputation must see the same."""
        before, self.multiplier = self.multiplier, multiplier
        try:
            yield
        finally:
            self.multiplier = before

    @torch.no_grad()
    def limit_norms(self, maximum: float) -> dict[str, Tensor]:
        """Scale every change to at most this norm; the values of sd-scripts' curves of it, 0-d and on the device."""
        limited = [adapter.limit_norm(maximum) for adapter in self if is_trainable(adapter)]
        norms = torch.stack([norm for norm, _ in limited])
        was_larger = torch.stack([larger for _, larger in limited])
        return {"keys_scaled": was_larger.sum(), "avg_key_norm": norms.mean(), "max_key_norm": norms.max()}

    def export_tensors(self) -> Tensors:
        """All entries of an adapter file: <group name>.<suffix> -> tensor, detached."""
        tensors: Tensors = {}
        for adapter in self:
            for suffix, tensor in adapter.export_tensors().items():
                tensors[f"{adapter.group.name}.{suffix}"] = tensor.detach()
        return tensors

    def report(self, unread: Collection[str] = ()) -> list[str]:
        """After the first backward: adapters whose layer never ran, and those that got no gradient.

        unread: adapters of layers that nothing depends on, which is no fault.
        """
        never_run: list[str] = []
        without_gradient: list[str] = []
        for name, adapter in self.adapters.items():
            if name in unread:
                continue
            if not is_trainable(adapter) or any(parameter.grad is not None for parameter in adapter.parameters()):
                continue
            (without_gradient if name in self._names_run else never_run).append(name)
        lines = [f"{len(never_run)} adapted layers never ran: {list_some(never_run)}"] if never_run else []
        if without_gradient:
            lines.append(f"{len(without_gradient)} adapters got no gradient: {list_some(without_gradient)}")
        return lines


@torch.no_grad()
def merge_adapter(adapter: Adapter, multiplier: float = 1.0) -> None:
    """Add an adapter's change to its layers' weights; the sum is rounded once, to the weights' own dtype."""
    for i, layer in enumerate(adapter.group.layers):
        layer.weight.copy_(layer.weight + multiplier * adapter.delta(i).to(layer.weight.device))


def is_trainable(adapter: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in adapter.parameters())
