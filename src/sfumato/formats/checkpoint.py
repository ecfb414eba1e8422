"""Reading checkpoints tensor by tensor, safetensors and pickled ones.

There is never a second copy of the weights: a tensor is read straight into its final memory, or through one small
buffer where the dtype changes.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, KeysView
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from sfumato.common.files import open_file, open_unbuffered, refuse_special_file
from sfumato.common.registry import did_you_mean
from sfumato.errors import UserError
from sfumato.formats.composed import ComposedFile
from sfumato.formats.gguf import GgufFile, is_gguf
from sfumato.formats.header import DOWNLOAD_AGAIN, HEADER_ONLY, TensorHeader, TensorInfo, merge_headers, read_header
from sfumato.formats.safe_pickle import LEGACY_SIGNATURE, ZIP_SIGNATURE, find_state_dict, load_pickle
from sfumato.formats.scaled import ScaledFile, has_scales
from sfumato.formats.shards import find_shard_files, is_sharded, read_sharded_headers
from sfumato.quantization.scaled_blocks import PlainFloat8
from sfumato.quantization.weight import QuantizedWeight
from sfumato.quantization.weight_format import WeightFormat

SAFETENSORS_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
KEPT_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # the kinds that are kept in memory as they are
SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # --save_precision
TOOL_DTYPES = {  # --save_precision of the tools for files
    **SAVE_DTYPES,
    "fp8": torch.float8_e4m3fn, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz, "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# Elements converted at a time: as many as torch converts in one thread. Several threads that wait for each other cost
# ten times more on a busy machine, and such a chunk stays in the processor's cache.
CHUNK_NUMEL = 1 << 15
THREAD_NUMEL = 1 << 18  # elements that are worth a read thread
MAX_READ_THREADS = 4
MAX_IO_BYTES = 1 << 30  # bytes; some systems refuse more at once


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a safetensors file, a folder or index of shards, a pickled checkpoint or a GGUF file (by their content).

    Weights with a scale beside them are read as the product of both. Use as a context manager. Raises UserError where
    it is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    refuse_special_file(path)
    if is_gguf(path):
        return GgufFile(path)
    file = PickledFile(path) if _is_pickled(path) else TensorFile(path)
    return ScaledFile(file) if has_scales(file.header) else file


def _is_pickled(path: Path) -> bool:
    """False also for a file that is missing or unreadable: reading it raises the error."""
    if path.name.endswith(".json"):
        return ".bin.index." in path.name
    try:
        with open_file(path) as file:
            return path.suffix != ".safetensors" and file.read(8).startswith((ZIP_SIGNATURE, LEGACY_SIGNATURE))
    except OSError:
        return False


class TensorFile:
    """One safetensors file, or the shards of one model."""

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        headers = read_sharded_headers(path) if is_sharded(path) else {path: read_header(path)}
        self.header = merge_headers(path, list(headers.values()))
        self._path_of: dict[str, Path] = {}
        for file, header in headers.items():
            self._path_of |= dict.fromkeys(header.tensors, file)
        self._stack = ExitStack()
        self._opened = _OpenFiles()
        self._maps: dict[Path, mmap.mmap] = {}  # each lives as long as a tensor that looks into it
        self._executor: ThreadPoolExecutor | None = None

    def keys(self) -> KeysView[str]:
        return self.header.tensors.keys()

    def paths(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(set(self._path_of.values()))

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read a tensor to `device`, floating-point ones as `dtype`. Raises UserError for an unknown name."""
        info = _get_info(self.header, name)
        stored = _get_torch_dtype(self.header.path, name, info)
        final = resolve_dtype(stored, dtype)
        path = self._path_of[name]
        if HEADER_ONLY in self.header.metadata:
            raise UserError(
                f"{path} says which tensors a model has, but holds none of them",
                code="tensor-file-header-only",
                fix="give the model's own file; this one serves `sfumato plan` alone",
            )
        widens_on_device = torch.device(device).type != "cpu" and stored.itemsize < final.itemsize
        tensor = torch.empty(info.shape, dtype=stored if widens_on_device else final)
        flat = tensor.reshape(-1)
        if tensor.dtype == stored:
            _read_into(self._open_file(path), info.start, view_bytes(flat))
        else:
            self._convert(path, info.start, stored, flat)
        return tensor.to(device).to(final)

    def iterate_pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor as it is stored, flat and in pieces that share one small buffer. Raises UserError for an unknown
        name."""
        info = _get_info(self.header, name)
        stored = _get_torch_dtype(self.header.path, name, info)
        buffer, start = torch.empty(CHUNK_NUMEL, dtype=stored), info.start
        while start < info.end:
            size = min(CHUNK_NUMEL * stored.itemsize, info.end - start)
            _read_into(self._open_file(self._path_of[name]), start, view_bytes(buffer)[:size])
            yield buffer[: size // stored.itemsize]
            start += size

    def map_tensor(self, name: str) -> Tensor:
        """A tensor as it is stored that looks into the file: its pages are read when they are used, and can be given
        up again. What is written into it stays in memory. Raises UserError for an unknown name."""
        info = _get_info(self.header, name)
        path = self._path_of[name]
        if path not in self._maps:
            with open_unbuffered(path) as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = _get_torch_dtype(self.header.path, name, info)
        if info.start == info.end:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(self._maps[path], dtype=torch.uint8, offset=info.start, count=info.end - info.start)
        return flat.view(dtype).reshape(info.shape)

    def find_format(self, name: str) -> WeightFormat | None:
        """In which format of fewer bits a weight is stored, from the header alone; None where in none."""
        return find_plain_format(self.header.tensors[name])

    def read_stored(self, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A weight of which `find_format` knows the format, as it is stored. dtype: that it is computed with."""
        return wrap_plain(self.read(name, device=device), dtype)

    def _convert(self, path: Path, start: int, stored: torch.dtype, out: Tensor) -> None:
        """Fill `out` from a file with another dtype, in several threads where it is large."""
        workers = min(MAX_READ_THREADS, torch.get_num_threads(), out.numel() // THREAD_NUMEL)
        if workers < 2:
            self._convert_span(path, start, stored, out)
            return
        if self._executor is None:
            self._executor = self._stack.enter_context(ThreadPoolExecutor(MAX_READ_THREADS, "read"))
        spans = out.split(-(-out.numel() // workers))
        starts = accumulate((span.numel() * stored.itemsize for span in spans[:-1]), initial=start)
        for _ in self._executor.map(lambda span, first: self._convert_span(path, first, stored, span), spans, starts):
            pass  # waits, and raises what a thread raised

    def _convert_span(self, path: Path, start: int, stored: torch.dtype, out: Tensor) -> None:
        """Read through one small buffer: there is never a copy of the whole tensor in its stored dtype."""
        file, buffer = self._open_file(path), torch.empty(CHUNK_NUMEL, dtype=stored)
        memory = view_bytes(buffer)
        for chunk in out.split(CHUNK_NUMEL):
            size = chunk.numel() * stored.itemsize
            _read_into(file, start, memory[:size])
            chunk.copy_(buffer[: chunk.numel()])
            start += size

    def _open_file(self, path: Path) -> FileIO:
        """A file object of this thread alone, since its position must not move with those of others."""
        if path not in self._opened.by_path:
            self._opened.by_path[path] = self._stack.enter_context(open_unbuffered(path))
        return self._opened.by_path[path]

    def close(self) -> None:
        self._stack.close()
        self._opened = _OpenFiles()
        self._maps = {}
        self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _OpenFiles(threading.local):
    """The open files of each thread."""

    def __init__(self) -> None:
        self.by_path: dict[Path, FileIO] = {}


class PickledFile:
    """A .ckpt, .pt or .bin file of tensors, or the shards of one model, read without running code from it.

    Offsets in the header count from the tensor itself; numbers and texts beside the tensors become its metadata.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        self._paths = find_shard_files(path)
        state, metadata = self._load()
        if not state:
            raise UserError(f"{path} holds no named tensors", code="pickle-without-tensors")
        tensors: dict[str, TensorInfo] = {}
        for name, tensor in state.items():
            dtype = DTYPE_NAMES.get(tensor.dtype)
            if dtype is None:
                raise UserError(f"{path}: {name!r} has the unknown dtype {tensor.dtype}", code="pickle-dtype-unknown")
            tensors[name] = TensorInfo(dtype=dtype, shape=tuple(tensor.shape), start=0, end=tensor.nbytes)
        self.header = TensorHeader(path=path, tensors=tensors, metadata=metadata)
        self._state = state

    def _load(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        state: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for path in self._paths:
            tensors, texts = find_state_dict(load_pickle(path))
            state |= tensors
            metadata |= texts
        return state, metadata

    def keys(self) -> KeysView[str]:
        return self.header.tensors.keys()

    def paths(self) -> list[Path]:
        """Like TensorFile.paths."""
        return list(self._paths)

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read."""
        _get_info(self.header, name)
        if not self._state:  # closed before
            self._state, _ = self._load()
        stored = self._state[name].detach()
        final = resolve_dtype(stored.dtype, dtype)
        return stored.to(device=device, dtype=final, copy=True, memory_format=torch.contiguous_format)

    def find_format(self, name: str) -> WeightFormat | None:
        """Like TensorFile.find_format."""
        return find_plain_format(self.header.tensors[name])

    def read_stored(self, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read_stored."""
        return wrap_plain(self.read(name, device=device), dtype)

    def close(self) -> None:
        self._state = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HeaderFile:
    """A checkpoint of which the header alone is used: tensors are allocated and never read, for rehearsals."""

    def __init__(self, file: Checkpoint, allocating: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """allocating: gives a context for what is allocated, which may be more than the machine has."""
        self.header = file.header
        self._find_format = file.find_format
        self._allocating = allocating

    def keys(self) -> KeysView[str]:
        return self.header.tensors.keys()

    def paths(self) -> list[Path]:
        """None: there is nothing to read."""
        return []

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read, but the tensor's values are whatever was in memory."""
        info = _get_info(self.header, name)
        stored = _get_torch_dtype(self.header.path, name, info)
        with self._allocating():
            return torch.empty(info.shape, dtype=resolve_dtype(stored, dtype), device=device)

    def map_tensor(self, name: str) -> Tensor:
        """Like TensorFile.map_tensor, without a file's pages."""
        return self.read(name)

    def find_format(self, name: str) -> WeightFormat | None:
        """Like TensorFile.find_format."""
        return self._find_format(name)

    def read_stored(self, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read_stored, without values."""
        own, shape = self._find_format(name), self.header.tensors[name].shape
        assert own is not None
        with self._allocating():
            stored = own.allocate(shape, device)
        return QuantizedWeight(own, stored, shape, dtype)

    def close(self) -> None:
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


Checkpoint = TensorFile | PickledFile | ScaledFile | GgufFile | HeaderFile | ComposedFile


def find_plain_format(info: TensorInfo) -> WeightFormat | None:
    """Of a weight without scales."""
    dtype = SAFETENSORS_DTYPES.get(info.dtype)
    return PlainFloat8(dtype=dtype) if dtype in KEPT_FLOAT8 and len(info.shape) > 1 else None


def wrap_plain(numbers: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """A weight in float8 without scales that is computed with in `dtype`."""
    return QuantizedWeight(PlainFloat8(dtype=numbers.dtype), {"numbers": numbers}, numbers.shape, dtype)


def _get_info(header: TensorHeader, name: str) -> TensorInfo:
    if name not in header.tensors:
        raise UserError(
            f"{header.path} has no tensor {name!r}",
            code="tensor-not-in-file",
            fix=did_you_mean(name, list(header.tensors)[:5000]),
        )
    return header.tensors[name]


def _get_torch_dtype(path: Path, name: str, info: TensorInfo) -> torch.dtype:
    if info.dtype not in SAFETENSORS_DTYPES:
        raise UserError(
            f"{path}: {name!r} is stored as {info.dtype}, which cannot be read", code="tensor-dtype-unreadable"
        )
    return SAFETENSORS_DTYPES[info.dtype]


def resolve_dtype(stored: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    """The requested dtype for floating-point tensors; others keep theirs."""
    return requested if requested is not None and stored.is_floating_point else stored


def view_bytes(flat: Tensor) -> memoryview:
    """The memory of a flat CPU tensor."""
    return flat.view(torch.uint8).numpy().data


def _read_into(file: FileIO, start: int, memory: memoryview) -> None:
    file.seek(start)
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done : done + MAX_IO_BYTES])
        if not count:
            raise UserError(
                f"{file.name!s} became shorter while it was read", code="tensor-file-shrank", fix=DOWNLOAD_AGAIN
            )
        done += count
