"""NormalFloat in four bits (Dettmers et al. 2023, "QLoRA", sec. 3): sixteen numbers, times the largest of each block.

The numbers are quantiles of the normal distribution; two are in a byte, the first in its upper half, as bitsandbytes
has them, but blocks begin anew with each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.quantization.constants import cached_tensor
from sfumato.quantization.scaled_blocks import SCALE_BYTES, join_blocks, split_blocks
from sfumato.quantization.weight_format import Stored, WeightFormat

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cached_tensor
def make_level_pairs() -> Tensor:
    """(256, 2): the two numbers of each byte."""
    levels = torch.tensor(NF4_LEVELS)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)


@dataclass(frozen=True, kw_only=True)
class NormalFloat4(WeightFormat):
    """Rows (N, K) in blocks of an even number of columns."""

    block: int = 64

    names: ClassVar[tuple[str, ...]] = ("pairs", "scales")

    @property
    def label(self) -> str:
        return f"nf4 with a scale for each {self.block} columns"

    def encode(self, weight: Tensor) -> Stored:
        blocks = split_blocks(weight.flatten(1).float(), self.block)
        scales = blocks.abs().amax(-1)
        scaled = blocks / torch.where(scales > 0, scales, 1).unsqueeze(-1)
        levels = torch.tensor(NF4_LEVELS)
        middles = ((levels[1:] + levels[:-1]) / 2).to(weight.device)
        chosen = torch.bucketize(scaled.flatten(1), middles, out_int32=True).to(torch.uint8)
        return {"pairs": chosen[:, ::2] * 16 + chosen[:, 1::2], "scales": scales}

    def decode(self, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The levels are float32, and their products with the scales are rounded once."""
        pairs, scales = stored["pairs"], stored["scales"]
        table = make_level_pairs().to(pairs.device)
        rows = F.embedding(pairs.int(), table).flatten(1)
        blocks = rows.reshape(len(rows), -1, self.block).mul_(scales.unsqueeze(-1)).to(dtype)
        columns = torch.Size(shape).numel() // shape[0]
        return join_blocks(blocks, columns).reshape(shape)

    def count_bytes(self, shape: Sequence[int]) -> int:
        blocks = -(-(torch.Size(shape).numel() // shape[0]) // self.block)
        return shape[0] * blocks * (self.block // 2 + SCALE_BYTES)
