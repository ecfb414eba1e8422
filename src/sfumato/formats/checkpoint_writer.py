"""Writing safetensors files tensor by tensor, byte for byte as the safetensors library would.

There is never a second copy of the weights: a tensor is written straight from its memory, or in small chunks where the
dtype or the device changes.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.common import files
from sfumato.errors import InternalError, UserError
from sfumato.formats.checkpoint import CHUNK_NUMEL, DTYPE_NAMES, MAX_IO_BYTES, resolve_dtype, view_bytes
from sfumato.formats.header import DTYPE_BITS, HEADER_ONLY, MAX_HEADER_BYTES, TensorInfo, read_header

DTYPE_ORDER = {name: rank for rank, name in enumerate(DTYPE_BITS)}
TRANSFER_BYTES = 16 << 20  # copied from a device at a time
TensorSpec = tuple[torch.dtype, Sequence[int]]  # dtype in the file, and shape


class DiskFull(UserError):
    """The disk has no space for a file; an older file of that name is still complete."""


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors (on any device, contiguous or not, shared or not): the complete file, or nothing.

    dtype: of floating-point tensors in the file; None keeps theirs. Raises DiskFull.
    """
    write_stream(path, make_specs(tensors, dtype), tensors.__getitem__, metadata)


def write_stream(
    path: Path,
    specs: Mapping[str, TensorSpec],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    leaders: Mapping[str, str] | None = None,
) -> None:
    """The same for tensors that are made one at a time: `make(name)` is called in file order, its result freed at once.

    specs: name -> dtype in the file and shape. leaders: name -> the one right after which it is made, wherever both lie
    in the file, e.g. of scales the weight that they were found with.
    """
    head, infos = build_header(specs, metadata)
    with catch_disk_full(path), files.write_atomically(path) as temporary:
        with FileIO(temporary, "w") as file:
            _write_all(file, memoryview(head))
            for name in order_names(infos, leaders or {}):
                file.seek(infos[name].start)
                _write_tensor(file, name, make(name), specs[name])
        written = read_header(temporary)
        assert written.tensors == infos, f"{path}: the written tensors differ from those given"
        assert written.metadata == dict(metadata or {}), f"{path}: the written metadata differs from that given"


def order_names(names: Iterable[str], leaders: Mapping[str, str]) -> Iterator[str]:
    """The names in their order, but those with a leader right after it."""
    followers: dict[str, list[str]] = {}
    for name, leader in leaders.items():
        followers.setdefault(leader, []).append(name)
    for name in names:
        if name not in leaders:
            yield name
            yield from followers.get(name, ())


def write_header_only(path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
    """A file that says which tensors a model has and holds none of them; reading one from it is a UserError."""
    head, _ = build_header(specs, {HEADER_ONLY: "true", **(metadata or {})})
    with catch_disk_full(path), files.write_atomically(path) as temporary:
        temporary.write_bytes(head)


@contextmanager
def catch_disk_full(path: Path) -> Iterator[None]:
    """Turn the system's errors for a full disk into DiskFull; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise DiskFull(
            f"{path} could not be written: {(error.strerror or 'no space left').lower()}",
            code="disk-full",
            fix="free space on that disk",
        ) from error


def make_specs(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    return {name: (resolve_dtype(tensor.dtype, dtype), tensor.shape) for name, tensor in tensors.items()}


def build_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The file's header as bytes, and the tensors in file order with their offsets: wide dtypes first, then by name.

    Raises InternalError for a dtype that safetensors files cannot hold, UserError for more metadata than they can.
    """
    for name, (dtype, _) in specs.items():
        if dtype not in DTYPE_NAMES:
            raise InternalError(f"{name!r} has the dtype {dtype}, which safetensors files cannot hold")
    ordered = sorted(specs, key=lambda name: (-DTYPE_ORDER[DTYPE_NAMES[specs[name][0]]], name))
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in ordered:
        dtype, shape = specs[name]
        end = start + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UserError(
            f"the metadata and names of tensors are {len(text):,} bytes long, but a safetensors file holds "
            f"{MAX_HEADER_BYTES:,} of them",
            code="safetensors-header-too-long",
            fix="shorten the metadata, e.g. its thumbnail",
        )
    first = 8 + len(text)
    infos = {}
    for name in ordered:
        start, end = entries[name]["data_offsets"]
        shape = tuple(entries[name]["shape"])
        infos[name] = TensorInfo(dtype=entries[name]["dtype"], shape=shape, start=first + start, end=first + end)
    return struct.pack("<Q", len(text)) + text, infos


def iter_chunks(name: str, tensor: Tensor, spec: TensorSpec) -> Iterator[memoryview]:
    """The bytes of a tensor in its dtype in the file; on the CPU and in that dtype already, without a copy."""
    dtype, shape = spec
    assert tensor.shape == torch.Size(shape), f"{name!r} has shape {tuple(tensor.shape)}, announced {tuple(shape)}"
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.dtype == dtype and flat.device.type == "cpu":
        yield view_bytes(flat)
        return
    if flat.device.type != "cpu":
        for chunk in flat.split(TRANSFER_BYTES // flat.dtype.itemsize):
            yield view_bytes(chunk.to(dtype).cpu())
        return
    for chunk in flat.split(CHUNK_NUMEL):
        yield view_bytes(chunk.to(dtype))


def _write_tensor(file: FileIO, name: str, tensor: Tensor, spec: TensorSpec) -> None:
    """A function of its own, so that the tensor is freed before the next one is made."""
    for chunk in iter_chunks(name, tensor, spec):
        _write_all(file, chunk)


def _write_all(file: FileIO, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        done += file.write(memory[done : done + MAX_IO_BYTES])
