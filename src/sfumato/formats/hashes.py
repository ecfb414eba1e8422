"""The hashes that the field names files by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sfumato.formats.checkpoint import layout, pieces, specs_of

HASHES = ("sshs_model_hash", "sshs_legacy_hash")
WINDOW = 0x100000, 0x110000  # bytes of a file that the short hash looks at


def adapter_hashes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, dtype: torch.dtype | None = None
) -> tuple[str, str]:
    """(sshs_model_hash, sshs_legacy_hash) of the file that these tensors and the ss_ entries of the metadata make.

    The first is the SHA-256 of the data section, the second 8 digits of that of bytes 0x100000 to 0x110000 of the
    file. Nothing is serialised; each tensor passes once.
    """
    specs = specs_of(tensors, dtype)
    head, infos = layout(specs, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    whole, window, place = hashlib.sha256(), hashlib.sha256(), len(head)
    window.update(head[WINDOW[0] : WINDOW[1]])
    for name in infos:
        for piece in pieces(name, tensors[name], specs[name]):
            whole.update(piece)
            window.update(piece[max(WINDOW[0] - place, 0) : max(WINDOW[1] - place, 0)])
            place += len(piece)
    return whole.hexdigest(), window.hexdigest()[:8]


def with_hashes(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """The metadata of an adapter file with the two hashes of these tensors, in place of any older ones."""
    hashes = adapter_hashes(tensors, metadata, dtype=dtype)
    return {**metadata, **dict(zip(HASHES, hashes, strict=True))}


def model_hash(path: Path | str) -> str:
    """The field's short name of a file: 8 digits, or NOFILE, or IsADirectory."""
    path = Path(path)
    if path.is_dir():
        return "IsADirectory"
    try:
        with path.open("rb") as file:
            file.seek(WINDOW[0])
            return hashlib.sha256(file.read(WINDOW[1] - WINDOW[0])).hexdigest()[:8]
    except FileNotFoundError:
        return "NOFILE"


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a whole file, or NOFILE, or IsADirectory; remembered in this process by path, size and time.

    About a second per 1.5 GB, during which other threads run.
    """
    path = Path(path)
    if path.is_dir():
        return "IsADirectory"
    try:
        facts = path.stat()
        return _remembered(path.absolute(), facts.st_size, facts.st_mtime_ns)
    except FileNotFoundError:
        return "NOFILE"


@lru_cache(maxsize=64)
def _remembered(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
