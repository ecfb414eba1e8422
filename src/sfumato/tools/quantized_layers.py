"""Weights of layers in eight bits, in the layouts that ComfyUI and our training read, and what rounding changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.adapters.low_rank import sum_squares
from sfumato.errors import UserError
from sfumato.formats.scaled import GROUP, ROTATED, divide_by_scale
from sfumato.quantization.choice import FLOAT8, FLOAT8_BLOCK, INT8_BLOCK
from sfumato.quantization.rotation import LARGEST_GROUP, choose_group, rotate
from sfumato.quantization.scaled_blocks import ScaledBlocks
from sfumato.tools.adapter_files.written_values import find_largest

QuantizedFor = Literal["comfyui", "training"]
Bits = Literal["fp8", "int8", "int8_rotated"]
MANY_NUMBERS = 1 << 18  # that are rounded at a time, in the processor's cache


@dataclass(frozen=True, kw_only=True)
class QuantizedLayout:
    """How the weights of layers are written."""

    label: str  # its name in the descriptions
    format: ScaledBlocks  # block: the most columns with one scale
    one_scale: bool = False  # whether a whole weight has one scale
    takes_convolutions: bool = False  # whether the reader knows their weights in eight bits


# ComfyUI's layouts, by the names that its files have for them; those for training are those of --fp8_scaled and
# --int8_base, under names that ComfyUI refuses instead of misreading the scales.
LAYOUTS: Mapping[tuple[QuantizedFor, Bits], QuantizedLayout] = {
    ("comfyui", "fp8"): QuantizedLayout(label="float8_e4m3fn", format=ScaledBlocks(dtype=FLOAT8), one_scale=True),
    ("comfyui", "int8"): QuantizedLayout(label="int8_tensorwise", format=ScaledBlocks(dtype=torch.int8)),
    ("comfyui", "int8_rotated"): QuantizedLayout(
        label="int8_tensorwise", format=ScaledBlocks(dtype=torch.int8, rotation=LARGEST_GROUP)
    ),
    ("training", "fp8"): QuantizedLayout(
        label="float8_rows", format=ScaledBlocks(dtype=FLOAT8, block=FLOAT8_BLOCK), takes_convolutions=True
    ),
    ("training", "int8"): QuantizedLayout(
        label="int8_rows", format=ScaledBlocks(dtype=torch.int8, block=INT8_BLOCK), takes_convolutions=True
    ),
    ("training", "int8_rotated"): QuantizedLayout(
        label="int8_rows",
        format=ScaledBlocks(dtype=torch.int8, block=INT8_BLOCK, rotation=LARGEST_GROUP),
        takes_convolutions=True,
    ),
}


class Rounded(NamedTuple):
    """A weight in eight bits."""

    numbers: Tensor
    scales: Tensor
    error: float  # of what they mean, relative


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """A weight that is written in eight bits."""

    key: str  # in the file
    block: str  # part and path of its block
    layout: QuantizedLayout  # its block and rotation are those of this weight
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.key.removesuffix(".weight")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        if self.layout.one_scale:
            return ()
        block = self.layout.format.block
        return (self.shape[0], -(-count_weight_columns(self.shape) // block) if block else 1)

    @property
    def description(self) -> dict[str, Any]:
        """What tells readers how the weight is stored."""
        own = self.layout.format
        described: dict[str, Any] = {"format": self.layout.label}
        described |= {"group_size": own.block} if own.block else {}
        return described | ({ROTATED: True, GROUP: own.rotation} if own.rotation else {})


def fit_layout(layout: QuantizedLayout, shape: Sequence[int]) -> QuantizedLayout:
    """The layout with the columns of a weight's blocks, which are as even as can be, and its rotation.

    A file tells the number of its blocks, not their width: 320 columns in three blocks are read as 107, 107 and 106.
    """
    columns, own = count_weight_columns(shape), layout.format
    count = -(-columns // own.block) if own.block else 1
    group = choose_group(columns) if own.rotation else 1
    fitted = replace(own, block=-(-columns // count) if count > 1 else 0, rotation=group if group > 1 else 0)
    return replace(layout, format=fitted)


def count_weight_columns(shape: Sequence[int]) -> int:
    """Of a weight, the kernel's included."""
    return torch.Size(shape[1:]).numel()


def round_weight(weight: Tensor, layer: LayerWeight) -> Rounded:
    """A weight (N, ...) in float32 -> its numbers and scales; UserError where it is not finite."""
    if find_largest(weight) == float("inf"):
        raise UserError(
            f"{layer.key} has values that are not finite (NaN or infinite)",
            code="quantize-not-finite",
            fix="use another save of the model",
        )
    own = layer.layout.format
    numbers, scales = torch.empty(weight.shape, dtype=own.dtype), torch.empty(layer.scale_shape)
    if layer.layout.one_scale:
        numbers, scales = divide_by_scale(weight, own.dtype, ())
    plain = replace(own, rotation=0)
    lost = whole = 0.0
    for part in iterate_row_slices(weight):
        # Errors are measured before rows are turned back, which changes no norm.
        rows = weight[part].flatten(1)
        rows = rotate(rows, own.rotation) if own.rotation else rows
        if layer.layout.one_scale:
            found = numbers[part].flatten(1).float() * scales
        else:
            stored = plain.encode(rows)
            numbers.flatten(1)[part], scales[part] = stored["numbers"], stored["scales"]
            found = plain.decode(stored, rows.shape, torch.float32)
        lost += sum_squares(found.sub_(rows))
        whole += sum_squares(rows)
    return Rounded(numbers, scales, (lost / whole) ** 0.5 if whole else 0.0)


def iterate_row_slices(weight: Tensor) -> Iterator[slice]:
    """Some rows at a time, so that there is no second copy of a large weight."""
    step = max(1, MANY_NUMBERS // count_weight_columns(weight.shape))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)
