"""What families do alike with one caption's text features: cut masked padding, apply prompt weights."""

from __future__ import annotations

from torch import Tensor

from sfumato.data.batch import Tensors


def cut_to_mask(hidden: Tensor, mask: Tensor) -> list[Tensors]:
    """(B, L, D) and bool mask (B, L) of tokens before padding -> per caption hidden (n, D) and mask (n,)."""
    lengths = mask.sum(1).tolist()
    return [{"hidden": row[:n], "mask": real[:n]} for row, real, n in zip(hidden, mask, lengths, strict=True)]


def multiply_by_weights(features: Tensors, weights: Tensor) -> Tensors:
    """One caption's features with hidden (L, D) multiplied by the tokens' weights (L,)."""
    hidden = features["hidden"]
    return {**features, "hidden": hidden * weights.to(hidden)[:, None]}
