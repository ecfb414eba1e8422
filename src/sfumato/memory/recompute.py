"""Gradient checkpointing: a block's forward runs again in backward, from its inputs; these may wait in main memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfumato.memory.transfer import Transfer

SMALLEST = 2**20  # bytes of an input that is worth a copy


def recompute(forward: Callable[..., Any], inputs: InputOffload | None = None) -> Callable[..., Any]:
    """A forward of which autograd keeps the inputs alone, in main memory where `inputs` is given.

    torch replays the random numbers of the devices that it finds among positional arguments, so that all are.
    """

    def forward_again_in_backward(*args: Any, **kwargs: Any) -> Any:
        names = tuple(kwargs)

        def call(*values: Any) -> Any:
            found = [value.read() if isinstance(value, WaitingInput) else value for value in values]
            return forward(*found[: len(args)], **dict(zip(names, found[len(args) : -1], strict=True)))

        values = [*args, *kwargs.values()]
        if inputs is None or not torch.is_grad_enabled():
            return checkpoint(call, *values, None, use_reentrant=False)
        waiting, anchor = inputs.take(values)
        output = checkpoint(call, *waiting, anchor, use_reentrant=False)
        inputs.send()
        return output

    return forward_again_in_backward


@dataclass(kw_only=True, eq=False)
class WaitingInput:
    """An input of a block: on the device during forward, then in main memory, and on the device again in backward."""

    offload: InputOffload
    tensor: Tensor | None  # on the device
    requires_grad: bool
    host: Tensor | None = None
    ready: Any = None  # the event after the copy to the device
    is_read: bool = False  # in backward

    def read(self) -> Tensor:
        if self.host is None:
            assert self.tensor is not None
            return self.tensor
        tensor = self.offload.bring(self)
        return tensor.requires_grad_(self.requires_grad)


@dataclass(eq=False)
class InputOffload:
    """The inputs of a network's blocks that are in main memory; the last ones come back first."""

    device: torch.device
    current: list[WaitingInput] = field(default_factory=list)  # of the block that runs
    waiting: list[ref[WaitingInput]] = field(default_factory=list)  # in the order of the forward
    leaving: list[tuple[Tensor, Any]] = field(default_factory=list)  # on the device until they are copied

    def __post_init__(self) -> None:
        self.transfer = Transfer(self.device)

    def take(self, values: list[Any]) -> tuple[list[Any], Tensor]:
        """The inputs of a block with those replaced that will wait; and an empty tensor that says the device."""
        found: list[Any] = []
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad and value.nbytes >= SMALLEST:
                value = WaitingInput(offload=self, tensor=value, requires_grad=True)
                self.current.append(value)
            found.append(value)
        return found, torch.empty(0, device=self.device)

    def send(self) -> None:
        """Start copying the inputs of the block that has run; those of the block before it are gone by now."""
        for _, copied in self.leaving:
            self.transfer.wait_for(copied)
        self.leaving.clear()
        computed = self.transfer.record_computed()
        for each in self.current:
            assert each.tensor is not None
            tensor, each.tensor = each.tensor.detach(), None
            with self.transfer.beside(computed):
                each.host = tensor.to("cpu", non_blocking=True, copy=True)
            self.leaving.append((tensor, self.transfer.record_copied()))
            self.waiting.append(ref(each))
        self.current.clear()

    def bring(self, each: WaitingInput) -> Tensor:
        """On the device; the copy of the one that will be needed next is started."""
        if each.tensor is None:
            self._fetch(each)
        self.transfer.wait_for(each.ready)
        tensor, each.tensor, each.is_read = each.tensor, None, True
        assert tensor is not None
        while self.waiting:
            before = self.waiting.pop()()
            if before is not None and not before.is_read:
                if before.tensor is None:
                    self._fetch(before)
                self.waiting.append(ref(before))
                break
        return tensor

    def _fetch(self, each: WaitingInput) -> None:
        assert each.host is not None
        each.tensor = torch.empty_like(each.host, device=self.device)
        with self.transfer.beside(self.transfer.record_computed()):
            each.tensor.copy_(each.host, non_blocking=True)
        each.ready = self.transfer.record_copied()
        self.transfer.share(each.tensor)
