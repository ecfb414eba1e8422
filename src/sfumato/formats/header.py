"""What a safetensors file says about itself: names, types, shapes and places of its tensors, without torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import UserError

LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library accepts
BITS = {  # in the library's order, which is also the order of tensors in a file, reversed
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
LOOKS_LIKE = {  # first bytes -> what the file is instead
    b"PK\x03\x04": "a pickled checkpoint (.ckpt, .pt, .bin)",
    b"\x80\x02\x8a\x0a": "an old pickled checkpoint (.ckpt, .pt)",
    b"version https://git-lfs": "a Git LFS pointer, not the file that it points to",
    b"<": "a web page, perhaps the answer to a download that needs a login",
    b"GGUF": "a GGUF file",
}
AGAIN = "download or copy it again"
RENAME = "rename it to end in .ckpt"
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def read_header(path: Path | str) -> Header:
    """The header of one file. Raises UserError unless the file is there, is a safetensors file, and is whole."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder where a safetensors file is expected")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(32)
            length = _header_length(path, start, size)
            file.seek(8)
            text = file.read(min(length, size))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if len(text) < length:
        raise _truncated(path, 8 + length, size)
    tensors, metadata = _parsed(path, text)
    header = Header(path=path, tensors=_placed(path, tensors, 8 + length), metadata=metadata)
    if header.end(8 + length) > size:
        raise _truncated(path, header.end(8 + length), size)
    if header.end(8 + length) < size:
        surplus = size - header.end(8 + length)
        raise UserError(f"{path} has {surplus:,} bytes more than its header promises; it is damaged", fix=AGAIN)
    return header


def sharded_headers(path: Path | str) -> dict[Path, Header]:
    """File -> header of a model saved in pieces: a `*.safetensors.index.json`, a folder that holds one, or a piece.

    A folder with a single safetensors file counts as one piece. Raises UserError where pieces are missing or disagree
    with the index.
    """
    path = Path(path)
    chosen = _main_file(path) if path.is_dir() else path
    if not chosen.name.endswith(".json"):
        return {piece: read_header(piece) for piece in pieces_of(chosen)}
    files = _index(chosen)
    headers = {chosen.parent / name: read_header(chosen.parent / name) for name in sorted(set(files.values()))}
    for file, header in headers.items():
        listed = {key for key, name in files.items() if name == file.name}
        odd = sorted(listed ^ set(header.tensors))
        if odd:
            raise UserError(f"{chosen} and {file.name} disagree about {len(odd)} tensors, as {odd[0]!r}", fix=AGAIN)
    return headers


def pieces_of(path: Path) -> list[Path]:
    """The files of a model of which `path` is one, by its name (x-00002-of-00003.safetensors); itself alone, else."""
    match = SHARD.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    return [path.with_name(f"{stem}-{i:05d}-of-{count}.safetensors") for i in range(1, int(count) + 1)]


def joined(path: Path, headers: Sequence[Header]) -> Header:
    """The header of all pieces together; `start` and `end` stay places inside each tensor's own file."""
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    return Header(path=path, tensors=tensors, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor in a file: safetensors' name of its type, its shape, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is in a file."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def end(self, first: int) -> int:
        """Size that the file must have when its data begins at byte `first`."""
        return max((info.end for info in self.tensors.values()), default=first)


def _header_length(path: Path, start: bytes, size: int) -> int:
    """The first eight bytes; raises UserError where they cannot be the start of a safetensors file."""
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if length < 2 or length > LONGEST_HEADER or (size > 8 and start[8:9] != b"{"):
        what = next((what for mark, what in LOOKS_LIKE.items() if start.lstrip().startswith(mark)), "")
        told = f"it looks like {what}" if what else f"it has {size:,} bytes and does not begin like one"
        raise UserError(f"{path} is not a safetensors file: {told}", fix=RENAME if "pickled" in what else AGAIN)
    return length


def _parsed(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        tensors = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError covers text that is not UTF-8, too
        raise UserError(f"{path}: the header is damaged ({error})", fix=AGAIN) from None
    metadata = tensors.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: the header is damaged (metadata is not a table of texts)", fix=AGAIN)
    return tensors, metadata


def _placed(path: Path, tensors: Mapping[str, Any], first: int) -> dict[str, TensorInfo]:
    """The header's entries, in file order, with places counted from the beginning of the file."""
    placed = {name: _entry(path, name, entry, first) for name, entry in tensors.items()}
    ordered = dict(sorted(placed.items(), key=lambda item: (item[1].start, item[1].end)))
    end = first
    for name, info in ordered.items():
        if info.start != end:
            raise UserError(f"{path}: the header is damaged (gap or overlap before {name!r})", fix=AGAIN)
        end = info.end
    return ordered


def _entry(path: Path, name: str, entry: Any, first: int) -> TensorInfo:
    try:
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        dtype = entry["dtype"]
        bits = math.prod(shape) * BITS.get(dtype, 0)
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: the header is damaged (entry {name!r})", fix=AGAIN) from None
    if dtype not in BITS:
        raise UserError(f"{path}: {name!r} has the unknown type {dtype!r}", fix="a newer sfumato may read it")
    if not whole or (end - start) * 8 != bits:
        raise UserError(f"{path}: the header is damaged (size of {name!r})", fix=AGAIN)
    return TensorInfo(dtype=dtype, shape=shape, start=first + start, end=first + end)


def _truncated(path: Path, expected: int, size: int) -> UserError:
    return UserError(f"{path} is cut off: it should have {expected:,} bytes and has {size:,}", fix=AGAIN)


def _main_file(folder: Path) -> Path:
    """The index of a folder, else its only safetensors file; variants (model.fp16.safetensors) come second."""
    indexes = sorted(folder.glob(f"*{INDEX}"))
    files = indexes or [file for file in sorted(folder.glob("*.safetensors")) if pieces_of(file)[0] == file]
    plain = [file for file in files if "." not in file.name.removesuffix(INDEX).removesuffix(".safetensors")] or files
    if len(plain) == 1:
        return plain[0]
    if not plain:
        raise UserError(f"{folder} holds no safetensors file")
    names = ", ".join(file.name for file in plain[:5])
    raise UserError(f"{folder} holds several models: {names}", fix="name the file instead of the folder")


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index file."""
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        plain = all(isinstance(name, str) and name == Path(name).name for name in files.values())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of safetensors files ({error!r})", fix=AGAIN) from None
    if not plain or not files:
        raise UserError(f"{path} must map tensors to files beside it", fix=AGAIN)
    return files
