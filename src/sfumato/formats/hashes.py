"""The hashes by which sd-scripts and web UIs name files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sfumato.common.files import open_file
from sfumato.formats.checkpoint_writer import build_header, iter_chunks, make_specs

HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash")
SHORT_HASH_WINDOW = 0x100000, 0x110000  # the bytes of a file that the short hash covers


def calculate_adapter_hashes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, dtype: torch.dtype | None = None
) -> tuple[str, str]:
    """(sshs_model_hash, sshs_legacy_hash) of the file that these tensors and the ss_ entries of the metadata make.

    The first is the SHA-256 of the data section, the second 8 digits of that of bytes 0x100000 to 0x110000 of the
    file. Nothing is serialized; each tensor is read once.
    """
    specs = make_specs(tensors, dtype)
    head, infos = build_header(specs, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    first, last = SHORT_HASH_WINDOW
    data_hash, window_hash, position = hashlib.sha256(), hashlib.sha256(), len(head)
    window_hash.update(head[first:last])
    for name in infos:
        for chunk in iter_chunks(name, tensors[name], specs[name]):
            data_hash.update(chunk)
            window_hash.update(chunk[max(first - position, 0) : max(last - position, 0)])
            position += len(chunk)
    return data_hash.hexdigest(), window_hash.hexdigest()[:8]


def add_hashes(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """The metadata of an adapter file with the two hashes of these tensors, in place of any older ones."""
    hashes = calculate_adapter_hashes(tensors, metadata, dtype=dtype)
    return {**metadata, **dict(zip(HASH_KEYS, hashes, strict=True))}


def calculate_model_hash(path: Path | str) -> str:
    """The short hash of a file, as in web UIs: 8 digits, or NOFILE, or IsADirectory."""
    path = Path(path)
    if path.is_dir():
        return "IsADirectory"
    try:
        with open_file(path) as file:
            file.seek(SHORT_HASH_WINDOW[0])
            return hashlib.sha256(file.read(SHORT_HASH_WINDOW[1] - SHORT_HASH_WINDOW[0])).hexdigest()[:8]
    except FileNotFoundError:
        return "NOFILE"


def calculate_sha256(path: Path | str) -> str:
    """SHA-256 of a file, or NOFILE, or IsADirectory; cached in this process by path, size and time.

    About a second per 1.5 GB, during which other threads run.
    """
    path = Path(path)
    if path.is_dir():
        return "IsADirectory"
    try:
        stat = path.stat()
        return _calculate_sha256(path.absolute(), stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        return "NOFILE"


@lru_cache(maxsize=64)
def _calculate_sha256(path: Path, size: int, mtime_ns: int) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
