"""GGUF files, as programs for inference write them: weights in ggml's blocks.

Denoisers and CLIP have their original keys, other text encoders mostly the names of llama.cpp.
"""

from __future__ import annotations

import math
import struct
from collections.abc import KeysView
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from sfumato.common.files import open_file
from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.formats.header import DOWNLOAD_AGAIN, TensorHeader, TensorInfo
from sfumato.quantization.gguf_blocks import BLOCK_TYPES, GgufBlocks
from sfumato.quantization.weight import QuantizedWeight

SIGNATURE = b"GGUF"
VERSIONS = (2, 3)
VALUE_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_ENTRIES = 1 << 24  # of one file or array; more is damage
PLAIN_TYPES = {  # whole numbers are those of positions, which CLIP's files may hold
    0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16), 28: ("F64", torch.float64),
    24: ("I8", torch.int8), 25: ("I16", torch.int16), 26: ("I32", torch.int32), 27: ("I64", torch.int64),
}  # fmt: skip
GGML_BLOCKS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
}  # fmt: skip
ADDS_ONE = ("gemma", "gemma2", "gemma3")  # to the weights of norms: what llama.cpp's converter does for these networks
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # before the name of a tensor that was reshaped to have whole blocks
BLOCKS_AS = "BF16"  # the dtype of blocks in the header: that of the weights before they were rounded
SUPPORTED = ", ".join(sorted([*BLOCK_TYPES, *(name for name, _ in PLAIN_TYPES.values())]))


def is_gguf(path: Path) -> bool:
    """False also for a file that is missing or unreadable: reading it raises the error."""
    try:
        with open_file(path) as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False


class GgufFile:
    """Like TensorFile. Raises UserError where the file is damaged or has types that are not known."""

    def __init__(self, path: Path) -> None:
        try:
            with open_file(path) as file:
                self._kinds, self.header = _read_header(path, file)
                size = file.seek(0, 2)
        except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise _make_damaged_error(path, str(error)) from None
        if not self._kinds or max(info.end for info in self.header.tensors.values()) > size:
            raise _make_damaged_error(path, "it ends before its last tensor" if self._kinds else "it has no tensors")

    def keys(self) -> KeysView[str]:
        return self.header.tensors.keys()

    def paths(self) -> list[Path]:
        """Like TensorFile.paths."""
        return [self.header.path]

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read; of blocks the weight that they mean, by default in bfloat16."""
        kind = self._kinds[name]
        if kind in GGML_BLOCKS:
            return self.read_stored(name, dtype=dtype or torch.bfloat16, device=device).decode()
        numbers = self._read_bytes(name).view(PLAIN_TYPES[kind][1]).reshape(self.header.tensors[name].shape)
        if name.endswith("norm.weight") and self.header.metadata.get("general.architecture") in ADDS_ONE:
            numbers = numbers.float() - 1  # before it is rounded to another dtype
        return numbers.to(device=device, dtype=dtype or numbers.dtype)

    def find_format(self, name: str) -> GgufBlocks | None:
        """Like TensorFile.find_format."""
        kind, info = GGML_BLOCKS.get(self._kinds[name]), self.header.tensors[name]
        if kind is None or len(info.shape) < 2 or info.numel // info.shape[0] % BLOCK_TYPES[kind].columns:
            return None  # among them what was reshaped, whose rows are not whole blocks
        return GgufBlocks(type_name=kind)

    def read_stored(self, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> QuantizedWeight:
        """Like TensorFile.read_stored."""
        shape = self.header.tensors[name].shape
        rows = 1 if self.find_format(name) is None else shape[0]
        blocks = self._read_bytes(name).reshape(rows, -1).to(device)
        return QuantizedWeight(GgufBlocks(type_name=GGML_BLOCKS[self._kinds[name]]), {"blocks": blocks}, shape, dtype)

    def _read_bytes(self, name: str) -> Tensor:
        info = self.header.tensors[name]
        with open_file(self.header.path) as file:
            file.seek(info.start)
            return torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch.uint8)

    def close(self) -> None:
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, int], TensorHeader]:
    """Name -> number of ggml's type, and the header."""
    _, version, tensors, entries = _unpack(file, "4sIQQ")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}")
    if max(tensors, entries) > MOST_ENTRIES:
        raise ValueError("its header counts too many entries")
    metadata = {}
    for _ in range(entries):
        name = _read_string(file)
        metadata[name] = _read_value(file, *_unpack(file, "I"))
    places: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensors):
        name, (dimensions,) = _read_string(file), _unpack(file, "I")
        *sizes, kind, offset = _unpack(file, f"{min(dimensions, 8)}QIQ")
        places.append((name, tuple(reversed(sizes)), kind, offset))
    alignment = metadata.get("general.alignment", 32)
    start = -(-file.tell() // alignment) * alignment
    infos = {
        name: _make_info(path, name, metadata.get(ORIGINAL_SHAPE + name, shape), shape, kind, start + offset)
        for name, shape, kind, offset in places
    }
    texts = {name: value for name, value in metadata.items() if isinstance(value, str)}
    return {name: kind for name, _, kind, _ in places}, TensorHeader(path=path, tensors=infos, metadata=texts)


def _make_info(path: Path, name: str, shape: Any, stored: tuple[int, ...], kind: int, start: int) -> TensorInfo:
    numel, shape = math.prod(stored), tuple(shape)
    if kind in PLAIN_TYPES:
        dtype, torch_dtype = PLAIN_TYPES[kind]
        return TensorInfo(dtype=dtype, shape=shape, start=start, end=start + numel * torch_dtype.itemsize)
    if kind not in GGML_BLOCKS:
        raise UserError(
            f"{path}: {name} has ggml's type {kind}, which cannot be read; known types: {SUPPORTED}",
            code="gguf-type-unknown",
            fix="give the model in one of these types, e.g. Q8_0, or as a safetensors file",
        )
    block = BLOCK_TYPES[GGML_BLOCKS[kind]]
    if numel % block.columns or math.prod(shape) != numel:
        raise ValueError(f"{name} has the shape {shape}, and {plural(numel, 'number')} in blocks of {block.columns}")
    return TensorInfo(dtype=BLOCKS_AS, shape=shape, start=start, end=start + numel // block.columns * block.size)


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))


def _read_string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    text = file.read(min(length, MOST_ENTRIES))
    if len(text) < length:
        raise ValueError("it ends within its header")
    return text.decode()


def _read_value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _read_string(file)
    if kind == ARRAY:
        inner, length = _unpack(file, "IQ")
        if length > MOST_ENTRIES or inner == ARRAY:
            raise ValueError("its header has an array that is too long or nested")
        return [_read_value(file, inner) for _ in range(length)]
    if kind not in VALUE_FORMATS:
        raise ValueError(f"its header has a value of the unknown type {kind}")
    return _unpack(file, VALUE_FORMATS[kind])[0]


def _make_damaged_error(path: Path, why: str) -> UserError:
    return UserError(f"{path} is a damaged GGUF file: {why}", code="gguf-damaged", fix=DOWNLOAD_AGAIN)
