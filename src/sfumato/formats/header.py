"""Safetensors headers: names, types, shapes and offsets of a file's tensors, read without torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.common.files import open_file
from sfumato.common.json_toml import Pairs, decode_json
from sfumato.common.text import has_lone_surrogate, plural
from sfumato.config.paths import suggest_path
from sfumato.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # bytes; what the safetensors library accepts
MAX_NUMBER = 1 << 63  # of elements and bytes
DTYPE_BITS = {  # in the library's order, which is also the order of tensors in a file, reversed
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FILE_SIGNATURES = {  # first bytes -> what the file is instead
    b"PK\x03\x04": "a pickled checkpoint (.ckpt, .pt, .bin)",
    b"\x80\x02\x8a\x0a": "an old pickled checkpoint (.ckpt, .pt)",
    b"version https://git-lfs": "a Git LFS pointer, not the file that it points to",
    b"<": "a web page, perhaps the answer to a download that needs a login",
    b"GGUF": "a GGUF file",
}
DOWNLOAD_AGAIN = "download or copy it again"
RENAME_TO_CKPT = "rename it to end in .ckpt"
FILE_FIXES = {  # for the kinds that another download does not help
    "a pickled checkpoint (.ckpt, .pt, .bin)": RENAME_TO_CKPT,
    "an old pickled checkpoint (.ckpt, .pt)": RENAME_TO_CKPT,
    "a GGUF file": "give the model as a safetensors file; those in fp8 are small, too",
}
HEADER_ONLY = "sfumato.header_only"  # metadata of a file that has this header and no tensors


def read_header(path: Path | str) -> TensorHeader:
    """Read the header of one file.

    Raises UserError where the file is missing, is no safetensors file, or has another size than its header says.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, a safetensors file is expected", code="tensor-file-is-folder")
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = _parse_header_length(path, file.read(32), size)
            file.seek(8)
            text = file.read(min(length, size))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", code="tensor-file-missing", fix=suggest_path(path)) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", code="tensor-file-unreadable") from error
    if len(text) < length:
        raise _truncation_error(path, 8 + length, size)
    entries, metadata = _parse_json(path, text)
    header = TensorHeader(path=path, tensors=_parse_entries(path, entries, 8 + length), metadata=metadata)
    expected = size if HEADER_ONLY in metadata else header.find_data_end(8 + length)
    if expected > size:
        raise _truncation_error(path, expected, size)
    if expected < size:
        raise UserError(
            f"{path} is damaged: it has {plural(size - expected, 'byte')} more than its header says",
            code="tensor-file-too-long",
            fix=DOWNLOAD_AGAIN,
        )
    return header


def merge_headers(path: Path, headers: Sequence[TensorHeader]) -> TensorHeader:
    """One header for all shards; `start` and `end` stay offsets inside each tensor's own file."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for header in headers:
        tensors |= header.tensors
        metadata |= header.metadata
    return TensorHeader(path=path, tensors=tensors, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor in a file: safetensors' name of its dtype, its shape, and the offsets of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """The tensors and the metadata of a file."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def find_data_end(self, first: int) -> int:
        """Size in bytes that the file must have where its data begins at byte `first`."""
        return max((info.end for info in self.tensors.values()), default=first)


def _parse_header_length(path: Path, start: bytes, size: int) -> int:
    """Read the first eight bytes; raises UserError where they cannot be the start of a safetensors file."""
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if length < 2 or length > MAX_HEADER_BYTES or (size > 8 and start[8:9] != b"{"):
        kinds = [kind for signature, kind in FILE_SIGNATURES.items() if start.lstrip().startswith(signature)]
        reason = f"it looks like {kinds[0]}" if kinds else f"it has {plural(size, 'byte')} and does not begin like one"
        raise UserError(
            f"{path} is not a safetensors file: {reason}",
            code="not-safetensors",
            fix=_find_fix(path, kinds),
        )
    return length


def _find_fix(path: Path, kinds: Sequence[str]) -> str:
    fix = FILE_FIXES.get(kinds[0], DOWNLOAD_AGAIN) if kinds else DOWNLOAD_AGAIN
    is_named_so = fix == RENAME_TO_CKPT and path.suffix != ".safetensors"
    return "give a safetensors file" if is_named_so else fix


def _parse_json(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of the tensors, and the metadata."""
    try:
        entries = decode_json(text, make_object=_make_object)
    except ValueError as error:
        raise _damage_error(path, str(error)) from None
    if (b"\\u" in text or b"\xed" in text) and has_lone_surrogate(json.dumps(entries, ensure_ascii=False)):
        raise _damage_error(path, "half a letter in a name or in the metadata")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damage_error(path, "metadata is not a table of texts")
    return entries, metadata


def _make_object(pairs: Pairs) -> dict[str, Any]:
    """ValueError where a name is given twice: either could be meant."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in it twice")
    return content


def _parse_entries(path: Path, entries: Mapping[str, Any], first: int) -> dict[str, TensorInfo]:
    """The tensors in file order, with offsets from the beginning of the file; their data begins at byte `first`."""
    infos = {name: _parse_entry(path, name, entry, first) for name, entry in entries.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    end = first
    for name, info in ordered.items():
        if info.start != end:
            raise _damage_error(path, f"gap or overlap before {name!r}")
        end = info.end
    return ordered


def _parse_entry(path: Path, name: str, entry: Any, first: int) -> TensorInfo:
    try:
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        dtype = entry["dtype"]
        is_known = dtype in DTYPE_BITS
    except (KeyError, TypeError, ValueError):
        raise _damage_error(path, f"entry {name!r}") from None
    if not is_known:
        raise UserError(
            f"{path}: {name!r} has the unknown dtype {dtype!r}",
            code="safetensors-dtype-unknown",
            fix="a newer sfumato may read it",
        )
    are_counts = all(type(number) is int and 0 <= number < MAX_NUMBER for number in (*shape, start, end))
    if not are_counts or (end - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise _damage_error(path, f"size of {name!r}")
    return TensorInfo(dtype=dtype, shape=shape, start=first + start, end=first + end)


def _truncation_error(path: Path, expected: int, size: int) -> UserError:
    return UserError(
        f"{path} is truncated: it should have {plural(expected, 'byte')} and has {size:,}",
        code="tensor-file-truncated",
        fix=DOWNLOAD_AGAIN,
    )


def _damage_error(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: the header is damaged ({reason})", code="safetensors-header-damaged", fix=DOWNLOAD_AGAIN)
