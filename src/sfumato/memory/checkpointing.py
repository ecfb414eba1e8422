"""Gradient checkpointing over a part's repeated blocks, the same for every family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from sfumato.formats.keymap import compile_pattern


def checkpoint_blocks(module: nn.Module, blocks: Sequence[str]) -> int:
    """Recompute each block in backward instead of keeping its activations; returns how many blocks match.

    Non-reentrant, so keyword arguments, nested outputs and adapters inside the blocks all work; the global
    generators are replayed, an adapter's dropout included.
    """
    patterns = [compile_pattern(block) for block in blocks]
    count = 0
    for path, block in module.named_modules():
        if any(pattern.fullmatch(path) for pattern in patterns):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            count += 1
    return count
