"""What the formats of weights mean, in formulas of their own: plain loops over rows and blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = {FLOAT8: 448, INT8: 127}
NF4 = [  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def round_scaled(weight: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Each `block` columns of a row on a grid of their own, in float32; the largest number is the grid's last."""
    rows = weight.float().flatten(1).clone()
    for row in rows:
        for part in row.split(block or len(row)):
            scale = part.abs().max() / LARGEST[dtype]
            if scale > 0:
                numbers = part / scale
                part.copy_((numbers.to(dtype).float() if dtype == FLOAT8 else numbers.round()) * scale)
    return rows.reshape(weight.shape)


def round_nf4(weight: Tensor, block: int = 64) -> Tensor:
    levels = torch.tensor(NF4)
    rows = weight.float().flatten(1).clone()
    for row in rows:
        for part in row.split(block):
            largest = part.abs().max()
            if largest > 0:
                nearest = (part.unsqueeze(1) / largest - levels).abs().argmin(1)
                part.copy_(levels[nearest] * largest)
    return rows.reshape(weight.shape)


def round_float8(weight: Tensor) -> Tensor:
    return weight.to(FLOAT8).float()


def hadamard(size: int) -> Tensor:
    """Entry (i, j) is -1 to the number of digits of i and j to the base 4 that add up to 3, over the root of the size.

    size: a power of 4.
    """

    def sign(i: int, j: int) -> int:
        return (-1) ** count_threes(i, j)

    def count_threes(i: int, j: int) -> int:
        digits = [(i // 4**n % 4, j // 4**n % 4) for n in range(round(math.log(size, 4)))]
        return sum(first + second == 3 for first, second in digits)

    return torch.tensor([[sign(i, j) for j in range(size)] for i in range(size)], dtype=torch.float32) / size**0.5
