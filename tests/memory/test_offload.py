"""Blocks in main memory compute what they compute on the device, and every copy is where it is used, in time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rehearsing import needs_rehearsal, rehearsal
from sfumato.memory.offload import BlockOffload, HostedBlock, choose_hosted_blocks
from sfumato.memory.rehearsal.device import Rehearsal

__all__ = ["rehearsal"]
CPU = torch.device("cpu")
COUNT = 5
SIZES = [6, 3, 9, 6, 4]  # the blocks' inner width


class Block(nn.Module):
    """Two layers, of which the second is used twice; a keyword argument, nested outputs."""

    gain: Tensor

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, inner), nn.Linear(inner, 4)
        self.register_buffer("gain", torch.tensor([0.5, 1.0, 1.5, 2.0]))

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        first = torch.tanh(self.down(torch.tanh(self.up(x + shift))))
        return x + first * self.gain, (self.down(torch.tanh(self.up(first))),)


class Net(nn.Module):
    """Blocks that run in another order than they are listed in, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for size in SIZES)
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number in (0, 2, 1, 3, 4, 2):
            x, (more,) = self.blocks[number](x, shift=x.mean())
            x = x + more
        return x.square().sum()


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    net.first.requires_grad_(True)  # stands for adapters, whose gradients go through all blocks
    return net


def offload(net: Net, numbers: range, slots: int, *, pins: bool = True) -> BlockOffload:
    """Wrapped as `wrap_blocks` does."""
    offload = BlockOffload(CPU, slots=slots, pins=pins)
    for number in numbers:
        block = net.blocks[number]
        block.forward = partial(checkpoint, offload.wrap(block, block.forward), use_reentrant=False)
    return offload


def run(net: Net) -> Iterator[Tensor]:
    """Losses and gradients of three steps, the second of two micro-batches, and a forward alone between them."""
    for rows in (2, 3, 2):
        net.zero_grad()
        for micro_batch in range(2 if rows == 3 else 1):
            loss = net(torch.arange(rows * 4.0).reshape(rows, 4) / 7 + micro_batch)
            loss.backward()
            yield loss.detach()
        for parameter in net.first.parameters():
            assert parameter.grad is not None
            yield parameter.grad.clone()
        with torch.no_grad():
            yield net(torch.ones(1, 4))


@pytest.mark.parametrize("pins", [True, False])
@pytest.mark.parametrize("slots", range(1, COUNT + 2))
def test_numbers_are_the_same(slots: int, pins: bool) -> None:
    expected = list(run(make_net()))
    net = make_net()
    before = dict(net.named_parameters())
    values = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    offload(net, range(COUNT), slots, pins=pins)
    found = list(run(net))
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert all(torch.equal(tensor, values[name]) for name, tensor in net.state_dict().items())


class Recorder:
    """In the place of torch.cuda: keeps for each stream what is known to have happened before its next operation."""

    def __init__(self) -> None:
        self.known: dict[str, set[int]] = {"compute": set(), "copies": set(), "host": set()}  # stream -> operations
        self.current, self.count = "compute", 0
        recorder = self

        class Stream:
            def __init__(self, device: object, name: str = "copies") -> None:
                self.name = name

            def wait_event(self, event: Event) -> None:
                recorder.known[self.name] |= event.known

        class Event:
            known: set[int]

            def record(self, stream: Stream) -> None:
                self.known = set(recorder.known[stream.name])

            def synchronize(self) -> None:
                recorder.known["host"] |= self.known

        self.Stream, self.Event = Stream, Event

    def current_stream(self, device: object) -> Any:
        return self.Stream(device, self.current)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def note(self) -> tuple[int, set[int]]:
        """The number of an operation on the current stream, and those that have happened before it."""
        before = set(self.known[self.current])
        self.count += 1
        self.known[self.current].add(self.count)
        return self.count, before


class Watch:
    """Follows every slot: what is in it, since which copy, and its uses since then."""

    def __init__(self, offload: BlockOffload, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorder = offload.transfer.module = Recorder()
        self.filled: dict[int, tuple[HostedBlock, int]] = {}  # slot -> block, its last copy
        self.used: dict[int, set[int]] = {}  # slot -> uses
        self.copied_back: set[int] = set()
        self.copies = self.uses = self.late = 0
        self.offload = offload
        copy_in = BlockOffload._copy_in

        def watched_copy_in(_: Any, block: HostedBlock, keep: Any) -> Any:
            slot = copy_in(offload, block, keep)
            with self.recorder.stream(self.recorder.Stream(None)):
                number, before = self.recorder.note()
            slot.ready.record(self.recorder.Stream(None))  # after this copy, too
            assert self.used.get(id(slot), set()) <= before, "overwritten before its last use"
            self.filled[id(slot)], self.used[id(slot)] = (block, number), set()
            self.copies += 1
            self.late += keep == ()
            return slot

        release = BlockOffload._release

        def watched_release(_: Any) -> None:
            visit = offload._current
            changed = [block for block in offload.blocks if visit and block is offload.blocks[visit.block]]
            changed = [block.slot for block in changed if block.changed]
            release(offload)
            for slot in changed:  # copied back after its last use; overwritten later
                with self.recorder.stream(self.recorder.Stream(None)):
                    number, before = self.recorder.note()
                assert self.used[id(slot)] <= before, "copied back before its last use"
                self.used[id(slot)].add(number)
                self.copied_back.add(number)

        monkeypatch.setattr(BlockOffload, "_release", watched_release)
        monkeypatch.setattr(BlockOffload, "_copy_in", watched_copy_in)
        for block in offload.blocks:
            self.watch_uses(block, monkeypatch)

    def watch_uses(self, block: HostedBlock, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between entering a slot and leaving it a block computes: noted at both ends."""
        enter, leave = block.enter, block.leave

        def use() -> None:
            assert block.slot is not None
            held, copy = self.filled[id(block.slot)]
            number, before = self.recorder.note()
            assert held is block, "another block is in the slot"
            assert copy in before, "used before its copy"
            self.used[id(block.slot)].add(number)
            self.uses += 1

        monkeypatch.setattr(block, "enter", lambda slot: (enter(slot), use()))
        monkeypatch.setattr(block, "leave", lambda: (use(), leave()))


@pytest.mark.parametrize("pins", [True, False])
@pytest.mark.parametrize("slots", range(1, COUNT + 1))
def test_no_copy_is_late_and_none_is_early(slots: int, pins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the order that events make, for every number of slots; from the second step on copies are under way early."""
    net = make_net()
    watch = Watch(offload(net, range(COUNT), slots, pins=pins), monkeypatch)
    late: list[int] = []
    for _ in run(net):
        late.append(watch.late)
    assert watch.uses > 2 * 6 * 4
    assert len({id(slot) for slot in watch.offload._slots}) == slots
    if slots == COUNT:
        assert watch.copies == COUNT
    if slots > 1:  # in the last step nothing is late but where the step is another than the one before
        assert [after - before for before, after in pairwise(late)][-3] <= 1


@pytest.mark.parametrize("hosted", range(1, COUNT + 1))
def test_blocks_that_train_are_copied_back_in_time(hosted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every number of blocks in main memory: each takes a step within backward, as on the device."""

    def train(net: Net, watched: BlockOffload | None) -> list[Tensor]:
        def step(weight: Tensor) -> None:
            assert weight.grad is not None
            weight.data.sub_(weight.grad, alpha=1e-3)
            weight.grad = None
            if watched is not None and id(weight) in stand_ins:
                watched.mark_changed()

        stand_ins = {id(tensor) for tensor in watched.stand_ins.values()} if watched else set()
        for parameter in net.parameters():
            target = watched.stand_ins.get(parameter, parameter) if watched else parameter
            assert isinstance(target, nn.Parameter)
            target.register_post_accumulate_grad_hook(step)
        for rows in (2, 3, 2):
            net(torch.arange(rows * 4.0).reshape(rows, 4) / 7).backward()
        return [parameter.detach().clone() for parameter in net.parameters()]

    plain = make_net().requires_grad_(True)
    for block in plain.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    net = make_net().requires_grad_(True)
    watched = offload(net, range(hosted), 2)
    watch = Watch(watched, monkeypatch)
    found = train(net, watched)
    assert len(watch.copied_back) >= 3 * hosted
    assert watch.copied_back <= watch.recorder.known["host"]  # which reads the weights between steps
    assert all(torch.equal(mine, other) for mine, other in zip(found, train(plain, None), strict=True))


def test_a_copy_without_its_event_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch itself: where the wait is missing, it fails."""
    net = make_net()
    watched = offload(net, range(COUNT), 2)
    Watch(watched, monkeypatch)
    monkeypatch.setattr(watched.transfer, "wait_for", lambda event: None)
    with pytest.raises(AssertionError, match="used before its copy"):
        list(run(net))


class TestChoice:
    def test_equal_blocks_are_counted_and_spread(self) -> None:
        net = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(3, 3) for _ in range(8))})
        chosen = choose_hosted_blocks(net, ["blocks.{n}"], 4)
        assert chosen == ("blocks.1", "blocks.3", "blocks.5", "blocks.7")
        assert choose_hosted_blocks(net, ["blocks.{n}"], 0) == ()
        assert len(choose_hosted_blocks(net, ["blocks.{n}"], 99)) == 8

    def test_small_blocks_count_by_their_size(self) -> None:
        """2 of the large ones hold 24 numbers."""
        blocks = nn.ModuleList(nn.Linear(3, 4 if number < 2 else 2, bias=False) for number in range(6))
        chosen = choose_hosted_blocks(nn.ModuleDict({"blocks": blocks}), ["blocks.{n}"], 2)
        sizes = [next(blocks[int(path[-1])].parameters()).numel() for path in chosen]
        assert sum(sizes) >= 24 > sum(sorted(sizes)[:-1])


@needs_rehearsal
def test_the_device_holds_the_slots_alone(rehearsal: Rehearsal) -> None:
    net = make_net()
    offload = BlockOffload(rehearsal.device)
    for block in net.blocks:
        block.forward = partial(checkpoint, offload.wrap(block, block.forward), use_reentrant=False)
    net.first.to(rehearsal.device)
    rehearsal.take_waits()
    x = torch.ones(2, 4, device=rehearsal.device)
    net(x).backward()
    largest = max(block.offsets[-1] for block in offload.blocks)
    kept = [x, *net.first.parameters(), *(p.grad for p in net.first.parameters() if p.grad is not None)]
    assert rehearsal.memory.allocated == 2 * largest + rehearsal.memory.sum_storages(kept)
    assert not rehearsal.take_waits()


def test_weights_that_change_in_main_memory_are_copied_again() -> None:
    """As those of an EMA do for previews; and back."""
    torch.manual_seed(0)
    blocks = [nn.Linear(4, 4) for _ in range(3)]
    offload = BlockOffload(torch.device("cpu"))
    forwards = [offload.wrap(block, block.forward) for block in blocks]
    x = torch.randn(2, 4)

    def run() -> Tensor:
        found = x
        for forward in forwards:
            found = forward(found)
        return found

    def expect() -> Tensor:
        found = x
        for block in blocks:
            found = nn.functional.linear(found, block.weight, block.bias)
        return found

    with torch.no_grad():
        for change in (0.0, 1.0, -1.0):
            for block in blocks:
                block.weight.add_(change)
            assert torch.equal(run(), expect())
            assert torch.equal(run(), expect())
