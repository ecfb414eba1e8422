"""Reading and writing checkpoints tensor by tensor.

No second copy of the weights is ever held: a tensor is read straight into its final memory, or through one small
buffer where the type changes, and written the same way.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import struct
import threading
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sfumato.common import files
from sfumato.common.registry import did_you_mean
from sfumato.errors import UserError
from sfumato.formats.header import AGAIN, BITS, INDEX, SHARD, Header, TensorInfo, joined, read_header, sharded_headers

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
PRECISIONS = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # --save_precision
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {name: rank for rank, name in enumerate(BITS)}
PIECE = 1 << 15  # elements converted at a time: as many as torch converts without sharing out the work, since its
# threads waiting for each other cost ten times more on a busy machine; it also stays in the processor's cache
SPAN = 1 << 18  # elements worth a reading thread of their own
READERS = 4
TRANSFER = 16 << 20  # bytes copied from a device at a time
PICKLED = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # torch.save's two formats
LARGEST_READ = 1 << 30  # bytes; some systems refuse more at once
Spec = tuple[torch.dtype, Sequence[int]]


class DiskFull(UserError):
    """No room for a file; whatever had its name before is still there, whole."""


# ---------------------------------------------------------------- reading


def open_checkpoint(path: Path | str) -> TensorFile | PickledFile:
    """A safetensors file, a folder or index of several, or a pickled checkpoint (told by its content).

    Raises UserError when it is missing, damaged, or holds more than tensors. Use as a context manager.
    """
    path = Path(path)
    pickled = path.suffix not in (".safetensors", ".json") and _begins_with(path, PICKLED)
    return PickledFile(path) if pickled else TensorFile(path)


def _begins_with(path: Path, marks: tuple[bytes, ...]) -> bool:
    """False for what is missing or unreadable, too; whoever reads it on says so."""
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(marks)
    except OSError:
        return False


class TensorFile:
    """One safetensors file, or several that make up one model."""

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        sharded = path.is_dir() or path.name.endswith(INDEX) or bool(SHARD.fullmatch(path.name))
        headers = sharded_headers(path) if sharded else {path: read_header(path)}
        self.header = joined(path, list(headers.values()))
        self._place = {name: file for file, header in headers.items() for name in header.tensors}
        self._stack = ExitStack()
        self._mine = _Files()
        self._readers: ThreadPoolExecutor | None = None

    def keys(self) -> KeysView[str]:
        return self.header.tensors.keys()

    def paths(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(set(self._place.values()))

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """An owned tensor in its final place. `dtype` changes floating-point tensors only, as everywhere here."""
        info = _info(self.header, name)
        stored = _torch_dtype(self.header.path, name, info)
        wanted = _wanted(stored, dtype)
        path = self._place[name]
        travels = stored if torch.device(device).type != "cpu" and stored.itemsize < wanted.itemsize else wanted
        tensor = torch.empty(info.shape, dtype=travels)
        flat = tensor.reshape(-1)
        if travels == stored:
            _fill(self._file(path), info.start, _bytes(flat))
        else:
            self._convert(path, info.start, stored, flat)
        return tensor.to(device).to(wanted)

    def _convert(self, path: Path, place: int, stored: torch.dtype, out: Tensor) -> None:
        """Fill `out` from a file with another type, in several threads where it is large."""
        workers = min(READERS, torch.get_num_threads(), out.numel() // SPAN)
        if workers < 2:
            self._convert_span(path, place, stored, out)
            return
        if self._readers is None:
            self._readers = self._stack.enter_context(ThreadPoolExecutor(READERS, "read"))
        spans = out.split(-(-out.numel() // workers))
        starts = accumulate((span.numel() * stored.itemsize for span in spans[:-1]), initial=place)
        for _ in self._readers.map(lambda s, start: self._convert_span(path, start, stored, s), spans, starts):
            pass  # waits, and raises what a thread raised

    def _convert_span(self, path: Path, place: int, stored: torch.dtype, out: Tensor) -> None:
        """Read through one small buffer, so that no copy of the tensor in its stored type ever exists."""
        file, buffer = self._file(path), torch.empty(PIECE, dtype=stored)
        memory = _bytes(buffer)
        for piece in out.split(PIECE):
            size = piece.numel() * stored.itemsize
            _fill(file, place, memory[:size])
            piece.copy_(buffer[: piece.numel()])
            place += size

    def _file(self, path: Path) -> FileIO:
        """This thread's own, for its place in it is its own, too."""
        if path not in self._mine.open:
            self._mine.open[path] = self._stack.enter_context(FileIO(path))
        return self._mine.open[path]

    def close(self) -> None:
        self._stack.close()
        self._mine = _Files()
        self._readers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Files(threading.local):
    """Open files of each thread."""

    def __init__(self) -> None:
        self.open: dict[Path, FileIO] = {}


class PickledFile:
    """A .ckpt or .pt file with nothing but tensors in it, read without running anything that it holds.

    Places in the header count from the tensor itself; numbers and texts beside the tensors become its metadata.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        state, metadata = _unnested(_unpickled(path))
        if not state:
            raise UserError(f"{path} holds no tensors by name")
        for name, tensor in state.items():
            if tensor.dtype not in NAMES:
                raise UserError(f"{path}: {name!r} has the unknown type {tensor.dtype}")
        tensors = {
            name: TensorInfo(dtype=NAMES[tensor.dtype], shape=tuple(tensor.shape), start=0, end=tensor.nbytes)
            for name, tensor in state.items()
        }
        self.header = Header(path=path, tensors=tensors, metadata=metadata)
        self._state = state

    def keys(self) -> KeysView[str]:
        return self.header.tensors.keys()

    def paths(self) -> list[Path]:
        """As TensorFile.paths."""
        return [self.header.path]

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As TensorFile.read."""
        _info(self.header, name)
        if not self._state:  # closed before
            self._state, _ = _unnested(_unpickled(self.header.path))
        stored = self._state[name].detach()
        wanted = _wanted(stored.dtype, dtype)
        return stored.to(device=device, dtype=wanted, copy=True, memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._state = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _info(header: Header, name: str) -> TensorInfo:
    if name not in header.tensors:
        raise UserError(f"{header.path} has no tensor {name!r}", fix=did_you_mean(name, list(header.tensors)[:5000]))
    return header.tensors[name]


def _torch_dtype(path: Path, name: str, info: TensorInfo) -> torch.dtype:
    if info.dtype not in DTYPES:
        raise UserError(f"{path}: {name!r} is stored as {info.dtype}, which cannot be read")
    return DTYPES[info.dtype]


def _wanted(stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and stored.is_floating_point else stored


def _bytes(flat: Tensor) -> memoryview:
    """The memory of a flat CPU tensor."""
    return flat.view(torch.uint8).numpy().data


def _fill(file: FileIO, place: int, memory: memoryview) -> None:
    file.seek(place)
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done : done + LARGEST_READ])
        if not count:
            raise UserError(f"{file.name!s} became shorter while it was read", fix=AGAIN)
        done += count


def _unpickled(path: Path) -> Any:
    zipped = _begins_with(path, PICKLED[:1])  # the older format cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise UserError(
                f"{path} holds more than tensors ({found[1]}), and loading that would run code from the file",
                fix="get a safetensors version of it, or convert it with a program that you trust",
            ) from None
        raise UserError(f"{path} is damaged", fix=AGAIN) from None
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"{path} is damaged ({why})", fix=AGAIN) from None


def _unnested(content: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, found inside `state_dict` where there is one, and the numbers and texts beside them."""
    metadata: dict[str, str] = {}
    while isinstance(content, Mapping):
        metadata |= {str(key): str(value) for key, value in content.items() if isinstance(value, str | int | float)}
        if not isinstance(content.get("state_dict"), Mapping):
            return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}, metadata
        content = content["state_dict"]
    return {}, metadata


# ---------------------------------------------------------------- writing


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors (on any device, contiguous or not, shared or not) as the safetensors library would, or nothing.

    dtype: what floating-point tensors become in the file. Raises DiskFull where there is no room.
    """
    write_stream(path, specs_of(tensors, dtype), tensors.__getitem__, metadata)


def write_stream(
    path: Path, specs: Mapping[str, Spec], make: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """The same for tensors that are made one at a time: `make(name)` is called in file order and forgotten at once.

    specs: name -> type in the file and shape.
    """
    head, infos = layout(specs, metadata)
    with room_for(path), files.atomic(path) as temporary:
        with FileIO(temporary, "w") as file:
            _write_all(file, memoryview(head))
            for name in infos:
                _write_tensor(file, name, make(name), specs[name])
        written = read_header(temporary)
        assert written.tensors == infos, f"{path}: the file does not hold what was to be written"
        assert written.metadata == dict(metadata or {}), f"{path}: the metadata changed on the way"


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn the system's ways of saying that there is no room into DiskFull; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise DiskFull(
            f"{path} could not be written: {(error.strerror or 'no space left').lower()}", fix="make room on that disk"
        ) from error


def specs_of(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Spec]:
    return {name: (_wanted(tensor.dtype, dtype), tensor.shape) for name, tensor in tensors.items()}


def layout(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, TensorInfo]]:
    """The file's header in bytes and, in file order, where each tensor lies: wide types first, then by name."""
    for name, (dtype, _) in specs.items():
        if dtype not in NAMES:
            raise UserError(f"{name!r} has the type {dtype}, which safetensors files cannot hold")
    ordered = sorted(specs, key=lambda name: (-RANK[NAMES[specs[name][0]]], name))
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    place = 0
    for name in ordered:
        dtype, shape = specs[name]
        end = place + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    infos = {}
    for name in ordered:
        start, end = entries[name]["data_offsets"]
        shape = tuple(entries[name]["shape"])
        infos[name] = TensorInfo(dtype=entries[name]["dtype"], shape=shape, start=first + start, end=first + end)
    return struct.pack("<Q", len(text)) + text, infos


def pieces(name: str, tensor: Tensor, spec: Spec) -> Iterator[memoryview]:
    """The bytes of a tensor in its type in the file, without a copy of the whole where none is needed."""
    dtype, shape = spec
    assert tensor.shape == torch.Size(shape), f"{name!r} has shape {tuple(tensor.shape)}, announced {tuple(shape)}"
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.dtype == dtype and flat.device.type == "cpu":
        yield _bytes(flat)
        return
    if flat.device.type != "cpu":
        yield from (_bytes(piece.to(dtype).cpu()) for piece in flat.split(TRANSFER // flat.dtype.itemsize))
        return
    for piece in flat.split(PIECE):
        yield _bytes(piece.to(dtype))


def _write_tensor(file: FileIO, name: str, tensor: Tensor, spec: Spec) -> None:
    """A function of its own, so that nothing of the tensor is left when the next one is made."""
    for piece in pieces(name, tensor, spec):
        _write_all(file, piece)


def _write_all(file: FileIO, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        done += file.write(memory[done : done + LARGEST_READ])
