"""Random weights for toy networks: a function of seed and name, without touching the generators in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sfumato.common.seeds import seed_of

SPREAD = 0.05  # of biases around 0, and of norm scales around 1


@torch.no_grad()
def make_random_network(
    build: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any], *, seed: int, purpose: str
) -> Any:
    """A network whose every parameter is random, scaled so that activations keep their size; float32, frozen."""
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
        network = build(config)
    for name, parameter in network.named_parameters():
        parameter.copy_(make_random_tensor(parameter.shape, name, seed_of(seed, f"{purpose} {name}")))
    return network.requires_grad_(False).eval()


def make_random_tensor(shape: torch.Size, name: str, seed: int) -> Tensor:
    """Weights of layers with variance 1 / inputs, scales of norms near 1, biases near 0."""
    normal = torch.randn(shape, generator=Generator().manual_seed(seed))
    if len(shape) > 1:
        return normal / math.sqrt(shape[1:].numel())
    return normal * SPREAD + (0.0 if name.endswith("bias") else 1.0)
