"""What families do alike with one caption's text features: cut masked padding, apply prompt weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.data.batch import Tensors


def cut_to_mask(hidden: Tensor, mask: Tensor) -> list[Tensors]:
    """(B, L, D) and bool mask (B, L) of tokens before padding -> per caption hidden (n, D) and mask (n,).

    mask: on the CPU, so that its lengths are known without waiting for the device.
    """
    lengths, moved = mask.sum(1).tolist(), mask.to(hidden.device, non_blocking=True)
    return [{"hidden": row[:n], "mask": real[:n]} for row, real, n in zip(hidden, moved, lengths, strict=True)]


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on the device, without waiting for their copies."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def multiply_by_weights(features: Tensors, weights: Tensor) -> Tensors:
    """One caption's features with hidden (L, D) multiplied by the tokens' weights (L,)."""
    hidden = features["hidden"]
    return {**features, "hidden": hidden * weights.to(hidden)[:, None]}
