"""Blocks that run again in backward give the same numbers, also from inputs that were in main memory meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rehearsing import needs_rehearsal, rehearsal
from sfumato.config.memory import MemoryOptions
from sfumato.memory import recompute
from sfumato.memory.blocks import wrap_blocks
from sfumato.memory.rehearsal.device import Rehearsal

__all__ = ["rehearsal"]
CPU = torch.device("cpu")
BLOCKS = ("blocks.{n}",)
WIDTH, COUNT = 64, 6


class Block(nn.Module):
    """With dropout, an argument by keyword, and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, *, x: Tensor, scale: float, shift: tuple[Tensor, None]) -> tuple[Tensor, None]:
        hidden = nn.functional.dropout(torch.tanh(self.up(x + shift[0])), 0.3)
        return x + scale * self.down(hidden), None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(COUNT))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x, _ = block(x=x, scale=0.5, shift=(x.new_ones(WIDTH), None))
        return x.square().sum()


def compute(**options: Any) -> list[Tensor]:
    """Losses and gradients of two steps, with a forward alone between them."""
    torch.manual_seed(0)
    net = Net()
    wrap_blocks(net, BLOCKS, MemoryOptions(**options), device=CPU)
    found: list[Tensor] = []
    for rows in (3, 5):
        net.zero_grad()
        loss = net(torch.ones(rows, WIDTH))
        loss.backward()
        found += [loss.detach(), *(each.grad.clone() for each in net.parameters() if each.grad is not None)]
        with torch.no_grad():
            found.append(net(torch.ones(1, WIDTH)))
    return found


OPTIONS = [
    {"gradient_checkpointing": True},
    {"checkpoint_every": 2},
    {"cpu_offload_checkpointing": True},
    {"cpu_offload_checkpointing": True, "checkpoint_every": 4},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_numbers_are_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, dropout included."""
    monkeypatch.setattr(recompute, "SMALLEST", 1)
    expected, found = compute(), compute(**options)
    assert len(found) == len(expected) == 2 * (2 + 2 + 4 * COUNT)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@needs_rehearsal
def test_memory_falls(rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step: with every block recomputed there are its inputs alone, with offload hardly any; nothing waits."""
    monkeypatch.setattr(recompute, "SMALLEST", 1)
    rows = 4096
    size = rows * WIDTH * 4  # of a block's input
    peaks: dict[str, float] = {}
    for options in ({}, *OPTIONS):
        net = Net().to(rehearsal.device)
        wrap_blocks(net, BLOCKS, MemoryOptions(**options), device=rehearsal.device)
        x = torch.ones(rows, WIDTH, device=rehearsal.device)
        rehearsal.take_waits()
        rehearsal.memory.reset_peak()
        before = rehearsal.memory.allocated
        net(x).backward()
        assert not rehearsal.take_waits()
        peaks[" ".join(options)] = (rehearsal.memory.peak - before) / size
    plain, all_blocks, every, offloaded, some = peaks.values()
    assert plain > every > all_blocks > offloaded + COUNT - 4
    assert plain > some > offloaded
