"""The contract of adapters, and the engine that attaches them by forward hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats.groups import Layer, LayerGroup

Tensors = dict[str, Tensor]


class Adapter(nn.Module, ABC):
    """A change of the weights of one group; knows no family and no file name."""

    boosted: ClassVar[tuple[str, ...]] = ()  # parameters that LoRA+ speeds up
    limited: ClassVar[bool] = False  # whether `limit_norm` works for this kind

    def __init__(self, group: LayerGroup) -> None:
        super().__init__()
        self._held = (group,)  # in a tuple: the layers are not this module's children

    @property
    def group(self) -> LayerGroup:
        return self._held[0]

    @abstractmethod
    def delta(self, i: int) -> Tensor:
        """Change of the group's i-th layer's weight, at strength 1, in that weight's shape."""

    def forward(self, x: Tensor, i: int) -> Tensor:
        """What to add to the i-th layer's output at strength 1; subclasses may avoid forming delta."""
        return apply_weight(self.group.layers[i], x, self.delta(i))

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        """The i-th layer's output for x with this change added, in the output's dtype.

        strength: one number, or (rows,), one for each row of the batch. Subclasses may spare a pass over the output.
        """
        change = self(x, i).to(output.dtype)
        if isinstance(strength, Tensor):
            return output + change * column(strength, change)
        return torch.add(output, change, alpha=strength)

    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """Shrink the parameters so that the change's norm is at most `maximum`; (norm now, whether it was larger).

        Both 0-d and on the device: nothing waits for it.
        """
        raise UserError(f"--scale_weight_norms does not work with {type(self).__name__}")

    @abstractmethod
    def tensors(self) -> Tensors:
        """File suffix -> tensor, e.g. lora_down.weight, alpha."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor]) -> Self:
        """The adapter that `tensors` were saved from; shapes that do not fit the group are a UserError."""


def column(values: Tensor, like: Tensor) -> Tensor:
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
        self._seen: set[str] = set()

    def __iter__(self) -> Iterator[Adapter]:
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield adapter

    def attach(self, groups: Sequence[LayerGroup], make: Callable[[LayerGroup], Adapter | None]) -> None:
        """Hook every group for which `make` gives an adapter; a name used twice is an error of ours."""
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
        self._seen.add(name)
        strength = self.multiplier
        if isinstance(strength, Tensor):
            return adapter.add_to(output, args[0], i, strength.repeat_interleave(output.shape[0] // strength.shape[0]))
        return output if strength == 0 else adapter.add_to(output, args[0], i, strength)

    @contextmanager
    def scaled(self, multiplier: float | Tensor) -> Iterator[None]:
        """Another strength for a while; only before the main forward, since recomputation must meet the same."""
        before, self.multiplier = self.multiplier, multiplier
        try:
            yield
        finally:
            self.multiplier = before

    @torch.no_grad()
    def merge(self, multiplier: float = 1.0) -> None:
        """Add every adapter's change to the weights it hooks."""
        for adapter in self:
            merge(adapter, multiplier)

    @torch.no_grad()
    def limit_norms(self, maximum: float) -> dict[str, Tensor]:
        """Shrink every change to at most this norm; what the field's curves show of it, 0-d and on the device."""
        found = [adapter.limit_norm(maximum) for adapter in self if trains(adapter)]
        norms, larger = torch.stack([norm for norm, _ in found]), torch.stack([was for _, was in found])
        return {"keys_scaled": larger.sum(), "avg_key_norm": norms.mean(), "max_key_norm": norms.max()}

    def tensors(self) -> Tensors:
        """All entries of an adapter file: <group name>.<suffix> -> tensor, detached."""
        return {
            f"{adapter.group.name}.{suffix}": tensor.detach()
            for adapter in self
            for suffix, tensor in adapter.tensors().items()
        }

    def report(self) -> list[str]:
        """After the first backward: adapters whose layer never ran, and those that got no gradient."""
        never = [name for name in self.adapters if name not in self._seen]
        idle = [
            name
            for name, adapter in self.adapters.items()
            if name in self._seen and trains(adapter) and all(p.grad is None for p in adapter.parameters())
        ]
        lines = [f"{len(never)} adapted layers never ran: {some(never)}"] if never else []
        return lines + ([f"{len(idle)} adapters got no gradient: {some(idle)}"] if idle else [])


@torch.no_grad()
def merge(adapter: Adapter, multiplier: float = 1.0) -> None:
    """Add an adapter's change to its layers' weights; the sum is rounded once, to the weights' own dtype."""
    for i, layer in enumerate(adapter.group.layers):
        layer.weight.copy_(layer.weight + multiplier * adapter.delta(i).to(layer.weight.device))


def trains(adapter: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in adapter.parameters())


def some(names: Sequence[str], limit: int = 5) -> str:
    """A few names and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def expect_suffixes(group: LayerGroup, tensors: Mapping[str, Tensor], known: Sequence[str]) -> None:
    """Refuse entries that an adapter kind does not know, instead of ignoring a part of the file."""
    unknown = [suffix for suffix in tensors if suffix not in known]
    if unknown:
        raise UserError(f"{group.name} has entries of another kind of adapter: {some(unknown)}")
