"""One micro-batch, as the training loop and the methods see it; knows no family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Geometry of every sample in pixels, always supplied; most families ignore it. Each (B, 2)."""

    original: Tensor  # height, width before resizing
    crop: Tensor  # top, left
    target: Tensor  # height, width of the bucket

    @classmethod
    def plain(cls, batch: int, height: int, width: int) -> Self:
        """What a picture made at this very size has: nothing resized, nothing cropped."""
        size = torch.tensor([[height, width]]).expand(batch, 2)
        return cls(original=size, crop=torch.zeros_like(size), target=size)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a method may want besides the image and its text; also built by sample.py for previews."""

    multiplier: Tensor | None = None  # (B,) adapter strength
    control: Tensor | None = None  # (B, 3, H, W) in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch; sample i is independent of its neighbours, of the rank and of the batch size."""

    ids: Tensor  # (B,) int64: epoch * epoch_length + place in the epoch's global order
    latents: Tensor | None  # (B, C, h, w), scaled and shifted
    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1] where latents are not cached
    captions: Sequence[str]  # after shuffling and dropout: exactly what was or will be encoded
    text: Mapping[str, Tensors]  # features of the CACHED encoders only, padded and stacked
    text_dropped: Mapping[str, Tensor]  # encoder name -> (B,) bool, from per-encoder dropout rates
    sizes: Sizes
    extras: Extras
    weight: Tensor  # (B,) prior_loss_weight or 1; 0 for a filler
    entry_seeds: Tensor  # (B,) int64: seed of the autoencoder posterior's noise, from the cache key
    mask: Tensor | None = None  # (B, 1, h, w) in [0, 1]
    preserve: Tensor | None = None  # (B,) bool: the target is the untrained model's own prediction; None: of none

    def take(self, places: Tensor) -> Self:
        """Only the samples at these places, (N,) int64."""
        return replace(self, **{name: taken(value, places) for name, value in vars(self).items()})


def taken(value: Any, places: Tensor) -> Any:
    """What a field of a batch holds for the samples at these places."""
    if isinstance(value, Tensor):
        return value[places]
    if isinstance(value, Mapping):
        return {name: taken(each, places) for name, each in value.items()}
    if isinstance(value, Sizes | Extras):
        return replace(value, **taken(vars(value), places))
    return None if value is None else [value[place] for place in places.tolist()]


def pad_stack(items: Sequence[Tensor]) -> Tensor:
    """Stack tensors of unequal shape, zero (False) beyond their ends; out of place, so gradients pass."""
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) == 1:
        return torch.stack(list(items))
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for item in items:
        missing = [(0, wanted - size) for size, wanted in zip(item.shape, longest, strict=True)]
        padded.append(F.pad(item, [n for pair in reversed(missing) for n in pair]))
    return torch.stack(padded)
