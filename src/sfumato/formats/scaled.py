"""Weights in eight bits with a scale beside each: read as the product of both, as programs for inference mean them."""

from __future__ import annotations

from collections.abc import KeysView, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.header import TensorHeader, TensorInfo

if TYPE_CHECKING:
    from sfumato.formats.checkpoint import PickledFile, TensorFile

# X.weight has its scale in X.scale_weight (ComfyUI since 2024), X.weight_scale (since 2025), X.weight_scale_inv
# (DeepSeek's, per block; despite its name it multiplies, too).
SCALE_NAMES = ("scale_weight", "weight_scale", "weight_scale_inv")
BESIDE_NAMES = ("scale_input", "input_scale", "comfy_quant")  # for activations, and a description of the format
MARKER = "scaled_fp8"  # one for each network; its dtype repeats that of the weights
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
WHOLE = ("F16", "BF16", "F32")  # of scales; weights that were not worth rounding may have one, too
OTHER_FILE = "give the file in bf16, fp16 or fp8"
READ_AS = "BF16"  # the dtype of a product in the header: that of the weights before they were rounded
ROWS_NUMEL = 1 << 17  # elements that are multiplied at a time
MANY_ROWS = 256  # that are divided at a time


def has_scales(header: TensorHeader) -> bool:
    """Whether weights of a file have scales, or it says that they are of that kind."""
    return any(key.rpartition(".")[2] in (*SCALE_NAMES, *BESIDE_NAMES, MARKER) for key in header.tensors)


class ScaledFile:
    """A file of weights with scales, with the interface of one without: the header has no scales, `read` multiplies.

    Raises UserError where a scale belongs to a weight in another format, e.g. in four bits.
    """

    def __init__(self, inner: TensorFile | PickledFile) -> None:
        self.inner = inner
        stored = inner.header.tensors
        self._scales = _find_scales(inner.header)
        self.header = replace(
            inner.header,
            tensors={
                key: _describe_product(info) if key in self._scales else info
                for key, info in stored.items()
                if key not in self._scales.values() and key.rpartition(".")[2] not in (*BESIDE_NAMES, MARKER)
            },
        )

    def keys(self) -> KeysView[str]:
        return self.header.tensors.keys()

    def find_scale(self, name: str) -> str | None:
        """The key of the scale beside a weight of the inner file; None where it has none."""
        return self._scales.get(name)

    def paths(self) -> list[Path]:
        """Like TensorFile.paths."""
        return self.inner.paths()

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read; the product is rounded once, to `dtype` or bfloat16."""
        scale = self._scales.get(name)
        if scale is None:
            return self.inner.read(name, dtype=dtype, device=device)
        weight, factors = (
            self.inner.read(name, device=device),
            self.inner.read(scale, dtype=torch.float32, device=device),
        )
        final = dtype or (torch.bfloat16 if weight.dtype.itemsize == 1 else weight.dtype)
        try:
            return multiply_by_scale(weight, factors, final)
        except ValueError as error:
            raise UserError(
                f"{self.header.path}: {scale} is {error}", code="weight-scale-shape", fix=OTHER_FILE
            ) from None

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def multiply_by_scale(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, ...) times a scale: one number, one for each row, or one for each block of rows and columns.

    scale: () or (1,), (N,) or (N, 1), (N / rows, K / columns), (N, K / columns, 1). Some rows at a time, in float32:
    there is no copy of the whole weight. Raises ValueError for other shapes.
    """
    flat = weight.reshape(len(weight), -1) if weight.ndim else weight.reshape(1, 1)
    blocks = scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(len(scale), -1)
    height, width = (-(-side // count) for side, count in zip(flat.shape, blocks.shape, strict=True))
    if any(
        -(-side // step) != count for side, step, count in zip(flat.shape, (height, width), blocks.shape, strict=True)
    ):
        raise ValueError(f"a scale of shape {tuple(scale.shape)} for a weight of shape {tuple(weight.shape)}")
    result = torch.empty(flat.shape, dtype=dtype, device=weight.device)
    for rows in torch.arange(len(flat), device=weight.device).split(max(1, ROWS_NUMEL // flat.shape[1])):
        factors = blocks[rows // height]
        if blocks.shape[1] > 1:
            factors = factors.repeat_interleave(width, dim=1)[:, : flat.shape[1]]
        place = slice(int(rows[0]), int(rows[-1]) + 1)
        result[place] = flat[place].float() * factors
    return result.reshape(weight.shape)


def divide_by_scale(values: Tensor, dtype: torch.dtype, scale_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The inverse for a weight (N, ...): eight-bit values in `dtype` and their scale (float32) in this shape.

    The largest value that shares a scale becomes the largest of the dtype; a whole that is 0 has the scale 1. Shapes
    are those of `multiply_by_scale`; raises ValueError for blocks that do not divide the weight.
    """
    flat = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    numel = torch.Size(scale_shape).numel()
    rows = 1 if numel == 1 else scale_shape[0]
    columns = numel // rows
    if flat.shape[0] % rows or flat.shape[1] % columns:
        raise ValueError(f"a scale of shape {tuple(scale_shape)} for a weight of shape {tuple(values.shape)}")
    blocks = flat.reshape(rows, flat.shape[0] // rows, columns, flat.shape[1] // columns)
    scale = blocks.abs().amax(dim=(1, 3)).float() / torch.finfo(dtype).max
    scale = torch.where(scale > 0, scale, torch.ones(()))
    result = torch.empty(blocks.shape, dtype=dtype)
    for block, place, factors in zip(blocks, result, scale, strict=True):
        for part, out in zip(block.split(MANY_ROWS), place.split(MANY_ROWS), strict=True):
            out.copy_(part / factors[:, None])
    return result.reshape(values.shape), scale.reshape(tuple(scale_shape))


def _find_scales(header: TensorHeader) -> dict[str, str]:
    """Key of a weight -> key of its scale. Raises UserError where that is in another format, e.g. in four bits."""
    scales: dict[str, str] = {}
    for key in header.tensors:
        module, _, name = key.rpartition(".")
        weight = f"{module}.weight" if module else "weight"
        if name in SCALE_NAMES and weight in header.tensors:
            kinds = header.tensors[weight].dtype, header.tensors[key].dtype
            if kinds[0] not in (*EIGHT_BITS, *WHOLE) or kinds[1] not in WHOLE:
                raise UserError(
                    f"{header.path} has weights stored as {kinds[0]} with scales stored as {kinds[1]}, a format for "
                    "inference that cannot be read",
                    code="weight-format-unsupported",
                    fix=OTHER_FILE,
                )
            scales[weight] = key
    return scales


def _describe_product(info: TensorInfo) -> TensorInfo:
    if info.dtype in WHOLE:
        return info
    return TensorInfo(dtype=READ_AS, shape=info.shape, start=0, end=2 * info.numel)
