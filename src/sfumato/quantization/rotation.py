"""Rotation along the input channels: it spreads what is large in few of them, so that fewer bits round less.

(x R) (W R)^T = x W^T for any orthogonal R. Here R is block-diagonal, of regular Hadamard matrices (Kronecker powers of
one of four rows, whose sums are all the same, so that no column adds up what it should spread). They are symmetric: the
same rotation undoes itself. Files of rotated int8 weights have the same matrices ("convrot").
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.quantization.constants import cached_tensor

LARGEST_GROUP = 256  # columns


@cached_tensor
def make_hadamard(size: int) -> Tensor:
    """(size, size), float32, orthogonal and symmetric. size: a power of 4."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


def choose_group(columns: int, largest: int = LARGEST_GROUP) -> int:
    """The largest power of 4 that divides the columns, at most `largest`; 1, which changes nothing, where none does."""
    group = 1
    while group * 4 <= largest and columns % (group * 4) == 0:
        group *= 4
    return group


def is_group(size: int, columns: int) -> bool:
    """Whether so many columns at a time can be rotated."""
    return size > 0 and columns % size == 0 and choose_group(size, size) == size


def rotate(rows: Tensor, largest: int = LARGEST_GROUP) -> Tensor:
    """(M, K) with each group of columns rotated; twice is the identity but for rounding."""
    group = choose_group(rows.shape[-1], largest)
    matrix = make_hadamard(group).to(device=rows.device, dtype=rows.dtype)
    return (rows.unflatten(-1, (-1, group)) @ matrix).flatten(-2)
