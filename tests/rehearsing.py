"""What the tests of the rehearsal share: a skip where torch is too old, and a small network of known sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sfumato.memory.rehearsal.backend import is_supported
from sfumato.memory.rehearsal.device import Rehearsal, rehearsal_device

needs_rehearsal = pytest.mark.skipif(not is_supported(), reason="the rehearsal needs a newer torch")


@pytest.fixture
def rehearsal() -> Iterator[Rehearsal]:
    torch.ones(1, requires_grad=True).sum().backward()  # torch sets up its threads at the first one
    with rehearsal_device() as device:
        yield device


def make_three_layers() -> nn.Sequential:
    """10 -> 20 -> 30 -> 5: 4020 bytes of float32 parameters."""
    return nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30), nn.Linear(30, 5))
