"""The rehearsal's memory is that of a calculation by hand, to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rehearsing import make_three_layers, needs_rehearsal, rehearsal

__all__ = ["rehearsal"]
pytestmark = needs_rehearsal

FLOAT = 4  # bytes
BATCH = 7
WEIGHTS = [(20 * 10) * FLOAT, (30 * 20) * FLOAT, (5 * 30) * FLOAT]
BIASES = [20 * FLOAT, 30 * FLOAT, 5 * FLOAT]
PARAMETERS = sum(WEIGHTS) + sum(BIASES)
INPUT, FIRST, SECOND = (BATCH * width * FLOAT for width in (10, 20, 30))


def test_a_network_counts_its_parameters(rehearsal):
    network = make_three_layers().to(rehearsal.device)
    assert rehearsal.memory.allocated == PARAMETERS == 4020
    assert rehearsal.memory.sum_storages(network.parameters()) == PARAMETERS


def test_forward_and_backward(rehearsal):
    network, x = make_three_layers().to(rehearsal.device), torch.zeros(BATCH, 10).to(rehearsal.device)
    before = PARAMETERS + INPUT
    assert rehearsal.memory.allocated == before
    rehearsal.memory.reset_peak()
    loss = network(x).sum()
    assert rehearsal.memory.allocated == before + FIRST + SECOND + FLOAT  # the input of each layer, and the loss
    loss.backward()
    assert rehearsal.memory.allocated == before + FLOAT + PARAMETERS  # a gradient for each parameter
    # The second layer's backward has the largest weight: its input and both gradients of activations are there, the
    # third layer's gradients already, and the first number of backward, which is 1.
    gradients = WEIGHTS[2] + BIASES[2] + WEIGHTS[1] + BIASES[1]
    assert rehearsal.memory.peak == before + 2 * FLOAT + FIRST + SECOND + FIRST + gradients


WIDTH, HIDDEN = 8, 64
SMALL, LARGE = BATCH * WIDTH * FLOAT, BATCH * HIDDEN * FLOAT


def make_block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_kept_for_backward(rehearsal, checkpointed):
    """Without checkpointing a block keeps its input and two hidden activations, with it the input alone."""
    blocks = nn.ModuleList(make_block() for _ in range(3)).to(rehearsal.device)
    x = torch.zeros(BATCH, WIDTH).to(rehearsal.device)
    before = rehearsal.memory.allocated
    rehearsal.memory.reset_peak()
    y = x
    for block in blocks:
        y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
    loss = y.sum()
    del y
    kept = 2 * SMALL + (0 if checkpointed else 3 * 2 * LARGE)  # the inputs of the second and third block
    assert rehearsal.memory.allocated == before + kept + FLOAT
    weights, biases = 2 * WIDTH * HIDDEN * FLOAT, (WIDTH + HIDDEN) * FLOAT
    loss.backward()
    assert rehearsal.memory.allocated == before + FLOAT + 3 * (weights + biases)
    names = {tensor.size for tensor in rehearsal.memory.list_peak()}
    assert LARGE in names


@pytest.mark.parametrize(
    ("options", "at_once"),
    [({"fused": True}, 0), ({"foreach": True}, PARAMETERS), ({}, PARAMETERS)],
    ids=["fused", "foreach", "default"],
)
def test_adamw(rehearsal, options, at_once):
    """Two moments of each parameter; the fused kind keeps its step on the device, foreach makes one list of roots."""
    network = make_three_layers().to(rehearsal.device)
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rehearsal.memory.reset_peak()
    assert rehearsal.memory.allocated == 2 * PARAMETERS
    optimizer.step()
    steps = 6 * FLOAT if options.get("fused") else 0
    assert rehearsal.memory.allocated == 4 * PARAMETERS + steps
    assert rehearsal.memory.peak == 4 * PARAMETERS + steps + at_once


def test_views_and_ties_count_once_and_freed_storages_go(rehearsal):
    x = torch.zeros(6, 10, device=rehearsal.device)
    rows, flat = x[2:], x.view(-1)
    assert rehearsal.memory.allocated == 240
    tied = nn.Linear(10, 10, bias=False).to(rehearsal.device)
    other = nn.Linear(10, 10, bias=False, device="meta")
    other.weight = tied.weight
    assert rehearsal.memory.sum_storages([tied.weight, other.weight]) == 400
    assert rehearsal.memory.allocated == 640
    del x, rows
    assert rehearsal.memory.allocated == 640  # the view still holds it
    del flat, tied
    assert rehearsal.memory.allocated == 400
    other.to("cpu")
    assert rehearsal.memory.allocated == 0
    other.to(rehearsal.device)
    assert rehearsal.memory.allocated == 400
    other.to("meta")
    assert rehearsal.memory.allocated == 0


def test_in_place_operations_take_nothing(rehearsal):
    x = torch.zeros(100, device=rehearsal.device)
    x.add_(1).mul_(2)
    x.copy_(torch.ones(100), non_blocking=True)
    assert (rehearsal.memory.allocated, rehearsal.memory.peak) == (400, 400)
    x = x.to(torch.bfloat16)
    assert (rehearsal.memory.allocated, rehearsal.memory.peak) == (200, 600)


def test_a_peak_lists_what_was_there_and_where_it_was_made(rehearsal):
    network, x = make_three_layers().to(rehearsal.device), torch.zeros(BATCH, 10, device=rehearsal.device)
    rehearsal.memory.name_modules({"net": network})
    rehearsal.memory.reset_peak()
    network(x).sum().backward()
    peak = rehearsal.memory.list_peak()
    assert sum(tensor.size for tensor in peak) == rehearsal.memory.peak
    origins = {(tensor.shape, tensor.origin) for tensor in peak}
    assert {((30, 20), "net.1.weight"), ((30, 20), "backward"), ((BATCH, 20), "net.0")} <= origins
    assert any(origin.startswith("test_rehearsal_meter.py:") for _, origin in origins)
    rehearsal.memory.reset_peak()
    assert rehearsal.memory.peak == rehearsal.memory.allocated
    assert sum(tensor.size for tensor in rehearsal.memory.list_peak()) == rehearsal.memory.peak
