"""Block offload: the weights of some blocks stay in main memory and visit a few slots on the device.

A slot holds one block. While one block computes, the block that came after it the last time is copied into another
slot, on a stream of its own: nothing waits but the device, and only for copies that are not there in time. Frozen
weights are never copied back. A block in a slot computes with stand-ins of its parameters, so that the parameters
themselves stay where they are, with the values that saving and resuming need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from sfumato.formats.keymap import compile_pattern
from sfumato.memory.transfer import Transfer, align
from sfumato.quantization.weight import QuantizedWeight

SLOTS = 2  # one computes, the other is being filled

Pass = Literal["inference", "forward", "backward"]


class Visit(NamedTuple):
    """A block's turn to compute."""

    block: int
    during: Pass


@dataclass(frozen=True, kw_only=True)
class HostedTensor:
    """One tensor of a block: where the block looks for it, and what it finds there in and out of a slot."""

    place: dict[str, Tensor]  # a module's own parameters or buffers, or what a weight is stored as
    name: str
    host: Tensor
    stand_in: nn.Parameter | None  # None for buffers


@dataclass(kw_only=True, eq=False)
class Slot:
    """Room for one block on the device."""

    buffer: Tensor  # bytes
    block: HostedBlock | None = None
    ready: Any = None  # the event after the copies into it
    free: Any = None  # the event after the last use of what it holds


@dataclass(kw_only=True, eq=False)
class HostedBlock:
    """A block whose weights are in main memory."""

    tensors: Sequence[HostedTensor]
    slot: Slot | None = None
    changed: bool = False  # whether its weights in the slot are newer than those in main memory
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # by slot
    versions: list[int] = field(default_factory=list)  # of the weights in main memory, when they went into the slot

    @cached_property
    def offsets(self) -> list[int]:
        """Of each tensor in a slot, and the size of all, in bytes."""
        sizes = [align(each.host.nbytes) for each in self.tensors]
        return [0, *accumulate(sizes)]

    def view(self, slot: Slot) -> list[Tensor]:
        """Its tensors in a slot."""
        if id(slot) not in self.views:
            self.views[id(slot)] = [
                slot.buffer[start : start + each.host.nbytes].view(each.host.dtype).view(each.host.shape)
                for each, start in zip(self.tensors, self.offsets, strict=False)
            ]
        return self.views[id(slot)]

    def list_versions(self) -> list[int]:
        """They count the changes of the weights in main memory."""
        return [each.host._version for each in self.tensors]

    def enter(self, slot: Slot) -> None:
        """Compute with what is in the slot."""
        for each, tensor in zip(self.tensors, self.view(slot), strict=True):
            if each.stand_in is not None:
                each.stand_in.data = tensor
            each.place[each.name] = tensor if each.stand_in is None else each.stand_in

    def leave(self) -> None:
        for each in self.tensors:
            each.place[each.name] = each.host


class BlockOffload:
    """The blocks of one network that are in main memory, and the slots that they share.

    `wrap` their forwards, inside of what recomputes them: the pass that recomputes brings a block for its backward.
    """

    def __init__(self, device: torch.device, *, slots: int = SLOTS, pins: bool = True) -> None:
        """pins: whether weights move into pinned memory, from which copies wait for nothing. Otherwise the program
        waits for a copy's reading, which starts when what computes meanwhile is launched."""
        self.transfer = Transfer(device)
        self.count = slots
        self.pins = pins
        self.blocks: list[HostedBlock] = []
        self.stand_ins: dict[Tensor, nn.Parameter] = {}  # parameter that trains -> what gets its gradient
        self._slots: list[Slot] = []  # those used longest ago first
        self._current: Visit | None = None
        self._last: Visit | None = None
        self._next: dict[Visit, Visit] = {}  # what came after each, the last time
        self._copied_back = False  # whether the host may read weights too early
        self._in_backward = False  # whether `_finish` is to be called at the end of this backward

    def wrap(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The block's forward with its weights in a slot. All blocks are wrapped before the first one computes."""
        number = len(self.blocks)
        self.blocks.append(HostedBlock(tensors=list(self._hold(block))))

        def forward_in_slot(*args: Any, **kwargs: Any) -> Any:
            visit = Visit(number, find_pass())
            self._bring(visit)
            with uncached_casts():
                output = forward(*args, **kwargs)
            if not self.pins:
                self._prefetch(visit)
            if visit.during != "backward":  # there its gradients are still to come
                self._release()
            return output

        return forward_in_slot

    def mark_changed(self) -> None:
        """Say that the weights of the block that computes were changed in its slot: they are copied back."""
        assert self._current is not None
        self.blocks[self._current.block].changed = True

    def _hold(self, block: nn.Module) -> Iterator[HostedTensor]:
        """Its weights and buffers, in one piece of pinned memory or where they are."""
        places = list(list_tensor_places(block))
        tensors = [place[name] for place, name in places]
        values = [tensor.data.contiguous() for tensor in tensors]
        hosts = self.transfer.pin_together(values) if self.pins else values
        for (place, name), tensor, host in zip(places, tensors, hosts, strict=True):
            if not isinstance(tensor, nn.Parameter):
                place[name] = host
                yield HostedTensor(place=place, name=name, host=host, stand_in=None)
                continue
            tensor.data = host
            empty = torch.empty(0, dtype=tensor.dtype, device=self.transfer.device)
            stand_in = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            if tensor.requires_grad:
                self.stand_ins[tensor] = stand_in
            yield HostedTensor(place=place, name=name, host=tensor, stand_in=stand_in)

    def _bring(self, visit: Visit) -> None:
        """Let a block compute in a slot, and start filling the others with those that will come after it."""
        self._release()
        if self._last is not None:
            self._next[self._last] = visit
        self._current = self._last = visit
        block = self.blocks[visit.block]
        slot = self._find_slot(block) or self._copy_in(block, keep=())
        self._slots.remove(slot)
        self._slots.append(slot)
        self.transfer.wait_for(slot.ready)
        block.enter(slot)
        if visit.during == "backward" and not self._in_backward:
            self._in_backward = True
            Variable._execution_engine.queue_callback(self._finish)
        if self.pins:
            self._prefetch(visit)

    def _prefetch(self, visit: Visit) -> None:
        """As many of the blocks that came next the last time as there are slots for."""
        keep = [self.blocks[visit.block]]
        for _ in range(self.count):  # the last block of a forward comes twice, since backward begins with it
            if visit not in self._next or len(keep) == self.count:
                return
            visit = self._next[visit]
            block = self.blocks[visit.block]
            if self._find_slot(block) is None:
                self._copy_in(block, keep=keep)
            keep.append(block)

    def _find_slot(self, block: HostedBlock) -> Slot | None:
        """Its slot, unless its weights in main memory have changed since, e.g. to those of an EMA."""
        if block.slot is not None and block.versions != block.list_versions():
            block.slot.block = None
            block.slot = None
        return block.slot

    def _copy_in(self, block: HostedBlock, keep: Sequence[HostedBlock]) -> Slot:
        """Start copying a block into the slot that was used longest ago, of those that hold no block to `keep`."""
        slot = next(slot for slot in self._find_slots() if slot.block is None or slot.block not in keep)
        if slot.block is not None:
            slot.block.slot = None
        with self.transfer.beside(slot.free), torch.no_grad():
            for tensor, each in zip(block.view(slot), block.tensors, strict=True):
                tensor.copy_(each.host, non_blocking=True)
        slot.ready, slot.block, block.slot = self.transfer.record_copied(), block, slot
        block.versions = block.list_versions()
        return slot

    def _find_slots(self) -> list[Slot]:
        if not self._slots:
            size = max(block.offsets[-1] for block in self.blocks)
            count = min(self.count, len(self.blocks))
            buffers = [torch.empty(size, dtype=torch.uint8, device=self.transfer.device) for _ in range(count)]
            for buffer in buffers:
                self.transfer.share(buffer)
            self._slots = [Slot(buffer=buffer) for buffer in buffers]
        return self._slots

    def _release(self) -> None:
        """The block that computes has launched all that reads its slot; changed weights are copied back."""
        if self._current is None:
            return
        block = self.blocks[self._current.block]
        self._current = None
        block.leave()
        slot = block.slot
        assert slot is not None
        slot.free = self.transfer.record_computed()
        if block.changed:
            block.changed = False
            with self.transfer.beside(slot.free), torch.no_grad():
                for tensor, each in zip(block.view(slot), block.tensors, strict=True):
                    if each.host.requires_grad:
                        each.host.copy_(tensor, non_blocking=True)
            slot.ready, self._copied_back = self.transfer.record_copied(), True
            block.versions = block.list_versions()

    def _finish(self) -> None:
        """At the end of a backward every weight is in main memory again, to be saved or averaged."""
        self._in_backward = False
        self._release()
        if self._copied_back:
            self._copied_back = False
            self.transfer.wait_on_host()


def list_tensor_places(block: nn.Module) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Where a block looks for its parameters and buffers, or for what a weight in fewer bits is stored as."""
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, QuantizedWeight):
                yield from ((parameter.stored, key) for key in parameter.stored)
            else:
                yield cast(Any, module._parameters), name
        yield from (
            (cast(Any, module._buffers), name) for name, tensor in module._buffers.items() if tensor is not None
        )


@contextmanager
def uncached_casts() -> Iterator[None]:
    """A context in which autocast keeps no copies: it would keep one of every weight that trains, on the device."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def find_pass() -> Pass:
    """What the program is doing."""
    if torch._C._current_graph_task_id() != -1:
        return "backward"
    return "forward" if torch.is_grad_enabled() else "inference"


def find_blocks(network: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Path -> block, of those whose path matches a pattern."""
    expressions = [compile_pattern(pattern) for pattern in patterns]
    modules = network.named_modules()
    return {path: module for path, module in modules if any(each.fullmatch(path) for each in expressions)}


def choose_hosted_blocks(network: nn.Module, patterns: Sequence[str], units: int) -> tuple[str, ...]:
    """Paths of blocks, spread over the network, that together hold as many numbers as `units` of its largest one.

    All blocks where these are fewer; none for 0. Spread, so that a block is copied while others compute.
    """
    if not units:
        return ()
    blocks = find_blocks(network, patterns)
    sizes = {path: sum(parameter.numel() for parameter in block.parameters()) for path, block in blocks.items()}
    paths = tuple(sizes)
    wanted = units * max(sizes.values(), default=0)
    for count in range(1, len(paths)):
        chosen = [paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)]
        if sum(sizes[path] for path in chosen) >= wanted:
            return tuple(chosen)
    return paths
