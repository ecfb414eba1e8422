"""Copies between host and device that nothing waits for: pinned memory, a stream of their own, events.

The only place that uses any of them. On the CPU, and on devices for which torch has no streams, it does nothing.
"""

from __future__ import annotations

import math
import mmap
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError

WITH_STREAMS = ("cuda", "xpu", "rehearsal")  # the device types whose torch module has Stream and Event
ALIGNMENT = 256  # bytes, of each tensor in a larger piece of memory


def align(size: int) -> int:
    """The size that a tensor of so many bytes takes in a larger piece of memory."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def unpin(driver: Any, address: int, pages: mmap.mmap) -> None:
    """pages: kept until here, since memory may not go before the driver lets it go."""
    driver.cudaHostUnregister(address)
    del pages


class Transfer:
    """The copies of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device) if device.type in WITH_STREAMS else None
        self._stream: Any = None

    def pin(self, tensor: Tensor) -> Tensor:
        """The tensor in pinned memory, from which copies wait for nothing; any thread may call it."""
        return tensor.pin_memory() if self.module and tensor.device.type == "cpu" else tensor

    def pin_together(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies in one piece of pinned memory, which is as large as they are; on the CPU the tensors themselves.

        torch's own pinned pieces have sizes of powers of two: a block of 340 MB would take 512.
        """
        if not self.module or not tensors:
            return list(tensors)
        sizes = [align(tensor.nbytes) for tensor in tensors]
        arena = self._make_arena(sum(sizes), like=tensors[0])
        pieces = arena.split(sizes)
        copies = [
            piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for piece, tensor in zip(pieces, tensors, strict=True)
        ]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor.detach())
        return copies

    def _make_arena(self, size: int, *, like: Tensor) -> Tensor:
        """Bytes in pinned memory, which is given back with the last tensor that looks into it.

        Without values where `like`, one of those to come, has none.
        """
        if self.device.type != "cuda":
            return like.new_empty(size, dtype=torch.uint8, device="cpu").pin_memory()
        pages = mmap.mmap(-1, max(size, 1))  # whole pages of its own, as the driver wants them
        arena = torch.frombuffer(pages, dtype=torch.uint8)[:size]
        driver, address = self.module.cudart(), arena.data_ptr()
        if int(driver.cudaHostRegister(address, len(pages), 0)) != 0:
            raise UserError(
                f"the driver refuses to pin {size / 1e9:.2f} GB of main memory",
                code="main-memory-not-pinned",
                fix="fewer --blocks_to_swap, or more main memory",
            )
        weakref.finalize(arena.untyped_storage(), unpin, driver, address, pages).atexit = False
        return arena

    @contextmanager
    def sending(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A context with a function that gives a pinned tensor on the device.

        The copies start at once, beside what the device is computing; what is launched after the context waits there.
        """
        if not self.module:
            yield lambda tensor: tensor
            return
        copying, sent = self._find_stream(), list[Tensor]()

        def send(tensor: Tensor) -> Tensor:
            with self.module.stream(copying):
                sent.append(tensor.to(self.device, non_blocking=True))
            return sent[-1]

        yield send
        computing = self.module.current_stream(self.device)
        computing.wait_stream(copying)
        for tensor in sent:
            tensor.record_stream(computing)  # else its memory could be given away while it is still read

    @contextmanager
    def beside(self, after: Any) -> Iterator[None]:
        """A context whose copies start after an event of `record_computed`, beside what the device is computing."""
        if not self.module:
            yield
            return
        copying = self._find_stream()
        if after is not None:
            copying.wait_event(after)
        with self.module.stream(copying):
            yield

    def share(self, tensor: Tensor) -> None:
        """Say that copies in `beside` use the tensor, too: its memory is given away only after them."""
        if self.module and tensor.device.type in WITH_STREAMS:
            tensor.record_stream(self._find_stream())

    def record_computed(self) -> Any:
        """An event after everything that was launched to compute; None where the device has no streams."""
        return self._record(lambda: self.module.current_stream(self.device))

    def record_copied(self) -> Any:
        """An event after everything that was launched in `beside`; None where the device has no streams."""
        return self._record(self._find_stream)

    def wait_for(self, event: Any) -> None:
        """Let what is launched from now on compute after an event; the host does not wait."""
        if event is not None:
            self.module.current_stream(self.device).wait_event(event)

    def wait_on_host(self) -> None:
        """Until everything that was launched in `beside` is done."""
        event = self.record_copied()
        if event is not None:
            event.synchronize()

    def _record(self, find_stream: Callable[[], Any]) -> Any:
        if not self.module:
            return None
        event = self.module.Event()
        event.record(find_stream())
        return event

    def _find_stream(self) -> Any:
        if self._stream is None:
            self._stream = self.module.Stream(self.device)
        return self._stream

    def fetch(self, tensors: Mapping[str, Tensor]) -> Fetched:
        """Start copying small results to the host; `Fetched.read` gives them."""
        if not self.module:
            return Fetched(tensors={name: tensor.detach().clone() for name, tensor in tensors.items()})
        on_host = {name: tensor.detach().to("cpu", non_blocking=True) for name, tensor in tensors.items()}  # pinned
        ready = self.module.Event()
        ready.record(self.module.current_stream(self.device))
        return Fetched(tensors=on_host, wait=ready.synchronize)

    def mark(self) -> Moment:
        """The moment at which the device will have done all that was launched so far."""
        if not self.module:
            return Moment(clock=time.perf_counter())
        event = self.module.Event(enable_timing=True)
        event.record(self.module.current_stream(self.device))
        return Moment(event=event)


@dataclass(kw_only=True)
class Fetched:
    """Tensors on their way to the host."""

    tensors: Mapping[str, Tensor]
    wait: Callable[[], None] = field(default=lambda: None)

    def read(self) -> dict[str, Tensor]:
        """On the CPU; waits only for what was launched before they were fetched, not for anything later."""
        self.wait()
        return {name: tensor.cpu() for name, tensor in self.tensors.items()}


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A moment of the device's time, or of the host's where the device has no events."""

    clock: float = 0.0
    event: Any = None

    def seconds_since(self, earlier: Moment) -> float:
        """Both must be over."""
        if self.event is None:
            return self.clock - earlier.clock
        return earlier.event.elapsed_time(self.event) / 1000
