"""Weights in eight bits with a scale beside each: read as the product of both, as programs for inference mean them."""

from __future__ import annotations

from collections.abc import KeysView, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from sfumato.common.json_toml import decode_json
from sfumato.errors import UserError
from sfumato.formats.header import TensorHeader, TensorInfo
from sfumato.quantization.products import LARGEST_NUMBER
from sfumato.quantization.rotation import is_group, rotate
from sfumato.quantization.scaled_blocks import ScaledBlocks, spread_scales
from sfumato.quantization.weight import QuantizedWeight

if TYPE_CHECKING:
    from sfumato.formats.checkpoint import PickledFile, TensorFile
    from sfumato.quantization.weight_format import WeightFormat

# X.weight has its scale in X.scale_weight (ComfyUI since 2024), X.weight_scale (since 2025), X.weight_scale_inv
# (DeepSeek's, per block; despite its name it multiplies, too).
SCALE_NAMES = ("scale_weight", "weight_scale", "weight_scale_inv")
DESCRIPTION = "comfy_quant"  # of a weight's format: the bytes of a JSON object, which metadata may hold instead
BESIDE_NAMES = ("scale_input", "input_scale", DESCRIPTION)  # the others are for activations
METADATA = "_quantization_metadata"
MARKER = "scaled_fp8"  # one for each network; its dtype repeats that of the weights
EIGHT_BITS = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I8": torch.int8,
}  # fmt: skip
WHOLE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # of scales, and of some weights with one
DTYPES = {**EIGHT_BITS, **WHOLE}
OTHER_FILE = "give the file in bf16, fp16 or fp8"
READ_AS = "BF16"  # the dtype of a product in the header: that of the weights before they were rounded
MANY_ROWS = 256  # that are divided at a time
ROTATED, GROUP = "convrot", "convrot_groupsize"  # entries of a description


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
        self._formats = {weight: self._read_format(weight, scale) for weight, scale in self._scales.items()}
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

    def paths(self) -> list[Path]:
        """Like TensorFile.paths."""
        return self.inner.paths()

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read; the product is rounded once, to `dtype` or bfloat16."""
        if name not in self._scales:
            return self.inner.read(name, dtype=dtype, device=device)
        stored = DTYPES[self.inner.header.tensors[name].dtype]
        final = dtype or (torch.bfloat16 if stored.itemsize == 1 else stored)
        product = self._read_product(name, dtype=final, device=device)
        return product.decode(final if stored.itemsize == 1 else torch.float32).to(final)

    def find_scale(self, name: str) -> str | None:
        """The key of the scale beside a weight of the inner file; None where it has none."""
        return self._scales.get(name)

    def find_rotation(self, name: str) -> int:
        """The group in which the rows of a weight with a scale are rotated; 0 where they are not."""
        return self._formats[name].rotation

    def find_format(self, name: str) -> WeightFormat | None:
        """Like TensorFile.find_format."""
        if name not in self._scales:
            return self.inner.find_format(name)
        info = self.inner.header.tensors[name]
        return self._formats[name] if info.dtype in EIGHT_BITS and len(info.shape) > 1 else None

    def read_stored(self, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read_stored."""
        if name not in self._scales:
            return self.inner.read_stored(name, dtype=dtype, device=device)
        return self._read_product(name, dtype=dtype, device=device)

    def _read_product(self, name: str, *, dtype: torch.dtype, device: torch.device | str) -> QuantizedWeight:
        numbers = self.inner.read(name, device=device)
        scales = self.inner.read(self._scales[name], dtype=torch.float32, device=device)
        stored = {"numbers": numbers, "scales": spread_scales(numbers.shape, scales)}
        return QuantizedWeight(self._formats[name], stored, numbers.shape, dtype)

    def _read_format(self, weight: str, scale: str) -> ScaledBlocks:
        """Raises UserError where the scales do not fit the weight, or its description names another format."""
        info, path = self.inner.header.tensors[weight], self.inner.header.path
        shape = self.inner.header.tensors[scale].shape
        try:
            scales = spread_scales(info.shape, torch.empty(shape, device="meta"))
        except ValueError as error:
            raise UserError(f"{path}: {scale} is {error}", code="weight-scale-shape", fix=OTHER_FILE) from None
        columns = info.numel // max(len(scales), 1)
        blocks = scales.shape[1]
        rotation = self._read_rotation(weight, columns) if info.dtype == "I8" else 0
        return ScaledBlocks(
            dtype=DTYPES[info.dtype], block=-(-columns // blocks) if blocks > 1 else 0, rotation=rotation
        )

    def _read_rotation(self, weight: str, columns: int) -> int:
        """The group in which an int8 weight is rotated, 0 where it is not. UserError for formats that are not known."""
        described = self._read_description(weight.rpartition(".")[0])
        kind, group = described.get("format", "int8"), described.get(GROUP, 256)
        known = isinstance(kind, str) and kind.startswith("int8") and "zero_point" not in described
        if not known or (described.get(ROTATED) and not (isinstance(group, int) and is_group(group, columns))):
            raise UserError(
                f"{self.inner.header.path}: {weight} is stored as {dict(described)}, a format for inference that "
                "cannot be read",
                code="int8-format-unsupported",
                fix=OTHER_FILE,
            )
        return group if described.get(ROTATED) else 0

    def _read_description(self, module: str) -> Mapping[str, Any]:
        key = f"{module}.{DESCRIPTION}"
        try:
            if key in self.inner.header.tensors:
                found = decode_json(bytes(self.inner.read(key).flatten().tolist()))
            else:
                found = self._read_metadata().get(module, {})
        except ValueError:
            return {"format": "damaged"}
        return found if isinstance(found, dict) else {"format": "damaged"}

    def _read_metadata(self) -> Mapping[str, Any]:
        found = decode_json(self.inner.header.metadata.get(METADATA, "{}"))
        layers = found.get("layers", {}) if isinstance(found, dict) else {}
        return layers if isinstance(layers, dict) else {}

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def divide_by_scale(
    values: Tensor, dtype: torch.dtype, scale_shape: Sequence[int], *, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """Of a weight (N, ...): eight-bit numbers in `dtype` and their scale (float32) in this shape.

    The largest value that shares a scale becomes the largest of the dtype; a whole that is 0 has the scale 1. rotation:
    the group in which rows are rotated before; 0 for none. Raises ValueError for blocks that do not divide the weight.
    """
    flat = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    numel = torch.Size(scale_shape).numel()
    rows = 1 if numel == 1 else scale_shape[0]
    columns = numel // rows
    if len(scale_shape) == 2 and rows == len(flat) and flat.shape[1] % columns:  # the last block of a row is shorter
        blocks = ScaledBlocks(dtype=dtype, block=-(-flat.shape[1] // columns), rotation=rotation)
        stored = blocks.encode(values)
        return stored["numbers"], stored["scales"].reshape(tuple(scale_shape))
    flat = rotate(flat, rotation) if rotation else flat
    if flat.shape[0] % rows or flat.shape[1] % columns:
        raise ValueError(f"a scale of shape {tuple(scale_shape)} for a weight of shape {tuple(values.shape)}")
    blocks = flat.reshape(rows, flat.shape[0] // rows, columns, flat.shape[1] // columns)
    scale = blocks.abs().amax(dim=(1, 3)).float() / (LARGEST_NUMBER.get(dtype) or torch.finfo(dtype).max)
    scale = torch.where(scale > 0, scale, torch.ones(()))
    result = torch.empty(blocks.shape, dtype=dtype)
    for block, place, factors in zip(blocks, result, scale, strict=True):
        for part, out in zip(block.split(MANY_ROWS), place.split(MANY_ROWS), strict=True):
            numbers = part / factors[:, None]
            out.copy_(numbers.round() if dtype == torch.int8 else numbers)
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
