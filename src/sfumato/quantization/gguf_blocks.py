"""The blocks of GGUF files (ggml's types): some columns of a row in a few bytes, which begin or end with their scales.

Scales are float16; the K types have a scale and a minimum of their own for each 16 or 32 columns, in 4, 6 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.quantization.weight_format import Stored, WeightFormat

Pieces = list[Tensor]  # of each block: (blocks, bytes), uint8
HALF = 2  # bytes of a float16
K_COLUMNS = 256  # of a block of the K types


class BlockType(NamedTuple):
    """One of ggml's types. decode: a block's pieces -> (blocks, columns), float32."""

    columns: int
    pieces: tuple[int, ...]  # bytes of each piece, in their order
    decode: Callable[[Pieces], Tensor]

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(self.pieces)


@dataclass(frozen=True, kw_only=True)
class GgufBlocks(WeightFormat):
    """Rows (N, K) of blocks of one type. Nothing is ever encoded: such weights come from files alone."""

    type_name: str  # "Q4_K"

    names: ClassVar[tuple[str, ...]] = ("blocks",)

    @property
    def label(self) -> str:
        return f"GGUF's {self.type_name}"

    def encode(self, weight: Tensor) -> Stored:
        raise UserError(
            f"weights in {self.label} cannot be changed, so no adapter is merged into them",
            code="gguf-weight-unchangeable",
            fix="--frozen_lora FILE, which adds the adapter beside them, or a model file in another format",
        )

    def allocate(self, shape: Sequence[int], device: torch.device | str) -> Stored:
        return {"blocks": torch.empty(shape[0], self.count_bytes(shape) // shape[0], dtype=torch.uint8, device=device)}

    def decode(self, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        kind = BLOCK_TYPES[self.type_name]
        blocks = stored["blocks"].reshape(-1, kind.size)
        return kind.decode(list(blocks.split(kind.pieces, 1))).to(dtype).reshape(shape)

    def count_bytes(self, shape: Sequence[int]) -> int:
        kind = BLOCK_TYPES[self.type_name]
        return torch.Size(shape).numel() // kind.columns * kind.size


# ---------------------------------------------------------------- pieces


def read_half(piece: Tensor) -> Tensor:
    """Float16 numbers: (blocks, 2 n) bytes -> (blocks, n), float32."""
    return piece.contiguous().view(torch.float16).float()


def split_bits(piece: Tensor, bits: int, *, run: int) -> Tensor:
    """Numbers of a few bits, those in the lowest bits of each `run` bytes first: (blocks, n) -> (blocks, n * 8 / bits).

    int32.
    """
    runs = piece.int().unflatten(1, (-1, 1, run))
    shifts = torch.arange(0, 8, bits, device=piece.device, dtype=torch.int32).reshape(1, 1, -1, 1)
    return ((runs >> shifts) & (2**bits - 1)).flatten(1)


def scale_columns(numbers: Tensor, scales: Tensor) -> Tensor:
    """(blocks, columns) times (blocks, n), each scale for as many columns."""
    return (numbers.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)


def shift_columns(numbers: Tensor, minima: Tensor) -> Tensor:
    """The same with a difference."""
    return (numbers.unflatten(1, (minima.shape[1], -1)) - minima.unsqueeze(-1)).flatten(1)


def read_six_bits(piece: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes with eight scales and eight minima of 6 bits: (blocks, 8) each. Four lie whole, four in pieces."""
    first, second, third = piece.int().split(4, 1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scales, minima


# ---------------------------------------------------------------- types


def _decode_q8_0(pieces: Pieces) -> Tensor:
    scale, numbers = pieces
    return numbers.contiguous().view(torch.int8) * read_half(scale)


def _decode_q4_0(pieces: Pieces) -> Tensor:
    scale, numbers = pieces
    return (split_bits(numbers, 4, run=16) - 8) * read_half(scale)


def _decode_q4_1(pieces: Pieces) -> Tensor:
    scale, minimum, numbers = pieces
    return split_bits(numbers, 4, run=16) * read_half(scale) + read_half(minimum)


def _decode_q5_0(pieces: Pieces) -> Tensor:
    scale, fifth, numbers = pieces
    return (_add_fifth_bits(numbers, fifth) - 16) * read_half(scale)


def _decode_q5_1(pieces: Pieces) -> Tensor:
    scale, minimum, fifth, numbers = pieces
    return _add_fifth_bits(numbers, fifth) * read_half(scale) + read_half(minimum)


def _add_fifth_bits(numbers: Tensor, fifth: Tensor) -> Tensor:
    """The fifth bits of 32 numbers are in four bytes, one after the other."""
    return split_bits(numbers, 4, run=16) | (split_bits(fifth, 1, run=1) << 4)


def _decode_q2_k(pieces: Pieces) -> Tensor:
    scales, numbers, scale, minimum = pieces
    scales = scales.int()
    scaled = scale_columns(split_bits(numbers, 2, run=32).float(), (scales & 15) * read_half(scale))
    return shift_columns(scaled, (scales >> 4) * read_half(minimum))


def _decode_q3_k(pieces: Pieces) -> Tensor:
    """Where the third bit of a number is 0, it is 4 less; scales of 6 bits are in two pieces, and 32 less."""
    thirds, numbers, scales, scale = pieces
    low, high = scales.split((8, 4), 1)
    six = split_bits(low, 4, run=8) | (split_bits(high, 2, run=4) << 4)
    signed = split_bits(numbers, 2, run=32) + 4 * split_bits(thirds, 1, run=32) - 4
    return scale_columns(signed.float(), (six - 32) * read_half(scale))


def _decode_q4_k(pieces: Pieces) -> Tensor:
    scale, minimum, scales, numbers = pieces
    own, minima = read_six_bits(scales)
    scaled = scale_columns(split_bits(numbers, 4, run=32).float(), own * read_half(scale))
    return shift_columns(scaled, minima * read_half(minimum))


def _decode_q5_k(pieces: Pieces) -> Tensor:
    scale, minimum, scales, fifth, numbers = pieces
    own, minima = read_six_bits(scales)
    whole = split_bits(numbers, 4, run=32) | (split_bits(fifth, 1, run=32) << 4)
    return shift_columns(scale_columns(whole.float(), own * read_half(scale)), minima * read_half(minimum))


def _decode_q6_k(pieces: Pieces) -> Tensor:
    low, high, scales, scale = pieces
    numbers = (split_bits(low, 4, run=64) | (split_bits(high, 2, run=32) << 4)) - 32
    return scale_columns(numbers.float(), scales.contiguous().view(torch.int8) * read_half(scale))


BLOCK_TYPES = {
    "Q4_0": BlockType(32, (HALF, 16), _decode_q4_0),
    "Q4_1": BlockType(32, (HALF, HALF, 16), _decode_q4_1),
    "Q5_0": BlockType(32, (HALF, 4, 16), _decode_q5_0),
    "Q5_1": BlockType(32, (HALF, HALF, 4, 16), _decode_q5_1),
    "Q8_0": BlockType(32, (HALF, 32), _decode_q8_0),
    "Q2_K": BlockType(K_COLUMNS, (16, 64, HALF, HALF), _decode_q2_k),
    "Q3_K": BlockType(K_COLUMNS, (32, 64, 12, HALF), _decode_q3_k),
    "Q4_K": BlockType(K_COLUMNS, (HALF, HALF, 12, 128), _decode_q4_k),
    "Q5_K": BlockType(K_COLUMNS, (HALF, HALF, 12, 32, 128), _decode_q5_k),
    "Q6_K": BlockType(K_COLUMNS, (128, 64, 16, HALF), _decode_q6_k),
}
