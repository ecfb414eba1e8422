"""Copies: nothing on the CPU; elsewhere pinned, on a stream of their own, and ordered by events."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rehearsing import needs_rehearsal, rehearsal
from sfumato.errors import UserError
from sfumato.memory.rehearsal.device import Rehearsal
from sfumato.memory.transfer import Transfer

__all__ = ["rehearsal"]


class TestOnTheCpu:
    def test_batches_stay_where_they_are(self) -> None:
        transfer, tensor = Transfer(torch.device("cpu")), torch.ones(3)
        assert transfer.pin(tensor) is tensor
        with transfer.sending() as send:
            assert send(tensor) is tensor

    def test_results_are_those_of_the_moment(self) -> None:
        total = torch.ones(())
        fetched = Transfer(torch.device("cpu")).fetch({"loss": total})
        total += 1
        assert fetched.read() == {"loss": torch.tensor(1.0)}

    def test_time_is_the_hosts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        transfer, clock = Transfer(torch.device("cpu")), iter([5.0, 7.5])
        monkeypatch.setattr("sfumato.memory.transfer.time.perf_counter", lambda: next(clock))
        earlier, later = transfer.mark(), transfer.mark()
        assert later.seconds_since(earlier) == 2.5


class Pinning:
    """In the place of torch.cuda, which has pinned pieces of memory: address -> bytes."""

    def __init__(self, result: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self.result = result

    def cudart(self) -> Pinning:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.pinned[address] = size
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


class TestOnePieceOfPinnedMemory:
    def make_transfer(self, driver: Pinning) -> Transfer:
        transfer = Transfer(torch.device("cpu"))
        transfer.device, transfer.module = torch.device("cuda"), driver
        return transfer

    def test_it_is_as_large_as_the_tensors_and_goes_with_the_last(self) -> None:
        driver = Pinning()
        tensors = [torch.randn(70_000), torch.randn(3, 5).t(), torch.tensor(3), torch.randn(9).bfloat16()]
        copies = self.make_transfer(driver).pin_together(tensors)
        assert all(map(torch.equal, copies, tensors))
        assert all(copy.is_contiguous() for copy in copies)
        ((address, size),) = driver.pinned.items()
        assert address % mmap.PAGESIZE == 0
        assert sum(tensor.nbytes for tensor in tensors) <= size < sum(tensor.nbytes for tensor in tensors) + 4 * 256
        assert all(address <= copy.data_ptr() < address + size for copy in copies)
        del copies[1:]
        assert driver.pinned
        assert torch.equal(copies[0], tensors[0])
        del copies
        assert not driver.pinned

    def test_a_driver_that_refuses(self) -> None:
        with pytest.raises(UserError, match="refuses to pin"):
            self.make_transfer(Pinning(result=2)).pin_together([torch.ones(3)])


class Driver:
    """In the place of torch.cuda: writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current = "compute"
        driver = self

        class Stream:
            def __init__(self, device: object, name: str = "copies") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                driver.calls.append(f"{self.name} waits for {other.name}")

        class Event:
            def __init__(self, *, enable_timing: bool = False) -> None:
                self.timed = enable_timing

            def record(self, stream: Stream) -> None:
                driver.calls.append(f"{'timed ' * self.timed}event on {stream.name}")

            def synchronize(self) -> None:
                driver.calls.append("host waits for event")

            def elapsed_time(self, later: Event) -> float:
                return 2500.0

        self.Stream, self.Event = Stream, Event

    def current_stream(self, device: object) -> Any:
        return self.Stream(device, "compute")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.current = stream.name
        yield
        self.current = "compute"


@needs_rehearsal
class TestOnADevice:
    @pytest.fixture
    def driver(self, rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> Driver:
        driver, move = Driver(), Tensor.to

        def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            driver.calls.append(f"copy on {driver.current}")
            return move(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, "to", watched)
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: driver.calls.append("pin") or tensor)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: driver.calls.append(f"for {stream.name}"))
        return driver

    def make_transfer(self, rehearsal: Rehearsal, driver: Driver) -> Transfer:
        transfer = Transfer(rehearsal.device)
        transfer.module = driver
        return transfer

    def test_a_batch(self, rehearsal: Rehearsal, driver: Driver) -> None:
        """One wait for all of it, of the device alone."""
        transfer = self.make_transfer(rehearsal, driver)
        with transfer.sending() as send:
            sent = [send(transfer.pin(torch.ones(4))) for _ in range(2)]
        assert {tensor.device.type for tensor in sent} == {"rehearsal"}
        copies = ["pin", "copy on copies"] * 2
        assert driver.calls == [*copies, "compute waits for copies", "for compute", "for compute"]
        assert not rehearsal.take_waits()

    def test_results(self, rehearsal: Rehearsal, driver: Driver) -> None:
        """The host waits for the event after their copies, and only when they are read."""
        transfer = self.make_transfer(rehearsal, driver)
        fetched = transfer.fetch({"loss": torch.ones((), device=rehearsal.device), "t": torch.ones(2)})
        assert driver.calls == ["copy on compute", "copy on compute", "event on compute"]
        values = fetched.read()
        assert driver.calls[-1] == "host waits for event"
        assert {name: value.device.type for name, value in values.items()} == {"loss": "cpu", "t": "cpu"}
        assert not rehearsal.take_waits()

    def test_time_is_the_devices(self, rehearsal: Rehearsal, driver: Driver) -> None:
        transfer = self.make_transfer(rehearsal, driver)
        earlier, later = transfer.mark(), transfer.mark()
        assert later.seconds_since(earlier) == 2.5
        assert driver.calls == ["timed event on compute"] * 2
