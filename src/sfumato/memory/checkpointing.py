"""Gradient checkpointing over a part's repeated blocks, the same for every family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from sfumato.formats.keymap import pattern


def checkpoint_blocks(module: nn.Module, blocks: Sequence[str]) -> int:
    """Recompute each block in backward instead of keeping its activations; returns how many blocks match.

    Non-reentrant, so keyword arguments, nested outputs and adapters inside the blocks all work; the global
    generators are replayed, an adapter's dropout included.
    """
    patterns = [pattern(block) for block in blocks]
    found = [each for path, each in module.named_modules() if any(p.fullmatch(path) for p in patterns)]
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(found)
