"""Weights in eight bits: as they are, or with a scale for each row or each block of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.quantization.products import LARGEST_NUMBER, can_multiply, divide_rows, multiply_rows, multiply_rows_back
from sfumato.quantization.rotation import rotate
from sfumato.quantization.weight_format import Stored, WeightFormat

NUMBER_LABELS = {torch.float8_e4m3fn: "float8", torch.float8_e5m2: "float8 (e5m2)", torch.int8: "int8"}
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class PlainFloat8(WeightFormat):
    """Each number rounded to float8, without a scale: what --fp8_base means in sd-scripts."""

    dtype: torch.dtype = torch.float8_e4m3fn

    names: ClassVar[tuple[str, ...]] = ("numbers",)
    largest: ClassVar[float] = LARGEST_NUMBER[torch.float8_e4m3fn]

    @property
    def label(self) -> str:
        return NUMBER_LABELS[self.dtype]

    def encode(self, weight: Tensor) -> Stored:
        return {"numbers": weight.to(self.dtype)}

    def decode(self, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return stored["numbers"].to(dtype).reshape(shape)

    def count_bytes(self, shape: Sequence[int]) -> int:
        return torch.Size(shape).numel()


@dataclass(frozen=True, kw_only=True)
class ScaledBlocks(WeightFormat):
    """Rows (N, K) in blocks, the last of which may be shorter; each is stored as numbers times one float32 scale."""

    dtype: torch.dtype
    block: int = 0  # columns; 0: all of a row
    rotation: int = 0  # before, each row is rotated in groups of so many columns, at most (rotation.py); 0: it is not
    computes: bool = False  # whether linear layers multiply the numbers themselves, which takes one scale for each row

    names: ClassVar[tuple[str, ...]] = ("numbers", "scales")

    @property
    def label(self) -> str:
        kind = f"{NUMBER_LABELS[self.dtype]} with a scale for each {f'{self.block} columns' if self.block else 'row'}"
        return f"{kind}{', rotated' if self.rotation else ''}{', for products in 8 bits' if self.computes else ''}"

    def encode(self, weight: Tensor) -> Stored:
        rows = weight.flatten(1).float()
        if self.rotation:
            rows = rotate(rows, self.rotation)
        numbers, scales = divide_rows(split_blocks(rows, self.block), self.dtype)
        return {"numbers": join_blocks(numbers, rows.shape[1]).reshape(weight.shape), "scales": scales}

    def decode(self, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Eight bits fit into every dtype; the product with float32 scales is rounded to it once, in place."""
        numbers, scales = stored["numbers"].to(torch.float32 if self.rotation else dtype, copy=True), stored["scales"]
        rows = numbers.reshape(len(scales), -1)
        blocks = split_blocks(rows, self.block or -(-rows.shape[1] // scales.shape[1]))
        rows = join_blocks(blocks.mul_(scales.unsqueeze(-1)), rows.shape[1])
        if self.rotation:
            rows = rotate(rows, self.rotation).to(dtype)
        return rows.reshape(shape)

    def has_numbers_of(self, other: WeightFormat) -> bool:
        return isinstance(other, ScaledBlocks) and replace(self, computes=other.computes) == other

    def multiply(self, x: Tensor, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not self.can_compute(shape):
            return super().multiply(x, stored, shape, dtype)
        if self.rotation:
            x = rotate(x, self.rotation)
        return multiply_rows(x, stored["numbers"], stored["scales"]).to(dtype)

    def multiply_back(self, gradient: Tensor, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not self.can_compute(shape):
            return super().multiply_back(gradient, stored, shape, dtype)
        back = multiply_rows_back(gradient, stored["numbers"], stored["scales"])
        return (rotate(back, self.rotation) if self.rotation else back).to(dtype)

    def can_compute(self, shape: Sequence[int]) -> bool:
        """Whether a layer of this size multiplies the numbers themselves."""
        return self.computes and can_multiply(shape[0], shape[1])

    def count_bytes(self, shape: Sequence[int]) -> int:
        numel = torch.Size(shape).numel()
        columns = numel // shape[0]
        return numel + SCALE_BYTES * shape[0] * (-(-columns // self.block) if self.block else 1)


def spread_scales(shape: Sequence[int], scales: Tensor) -> Tensor:
    """The scales of a weight's blocks, or its only one, for each of its rows: (N, blocks of a row).

    scales: () or (1,), (N,) or (N, 1), (N / rows, K / columns), (N, K / columns, 1). Raises ValueError for others.
    """
    count = shape[0] if shape else 1
    blocks = scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(len(scales), -1)
    sides = count, torch.Size(shape).numel() // max(count, 1)
    for side, number in zip(sides, blocks.shape, strict=True):
        step = -(-side // max(number, 1))
        if -(-side // max(step, 1)) != number:
            raise ValueError(f"a scale of shape {tuple(scales.shape)} for a weight of shape {tuple(shape)}")
    return blocks.repeat_interleave(-(-count // len(blocks)), 0)[:count]


def split_blocks(rows: Tensor, width: int) -> Tensor:
    """(N, K) -> (N, blocks, width), with zeros after the last column; 0: one block."""
    width = width or rows.shape[1]
    missing = -rows.shape[1] % width
    return (F.pad(rows, (0, missing)) if missing else rows).reshape(len(rows), -1, width)


def join_blocks(blocks: Tensor, columns: int) -> Tensor:
    """The inverse of `split_blocks`."""
    return blocks.flatten(1)[:, :columns]
