"""A checkpoint that no file holds: each tensor is made when it is read, e.g. as a copy of another network's."""

from __future__ import annotations

from collections.abc import Callable, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from sfumato.errors import InternalError
from sfumato.formats.header import TensorHeader, TensorInfo


class ComposedFile:
    """Float32 tensors of these shapes, by name. make: one of them on the CPU. close: closes what it reads."""

    def __init__(
        self, path: Path, shapes: Mapping[str, Sequence[int]], make: Callable[[str], Tensor], close: Callable[[], None]
    ) -> None:
        """path: for messages."""
        infos: dict[str, TensorInfo] = {}
        for name, shape in shapes.items():
            size = torch.Size(shape).numel() * torch.float32.itemsize
            infos[name] = TensorInfo(dtype="F32", shape=tuple(shape), start=0, end=size)
        self.header = TensorHeader(path=path, tensors=infos, metadata={})
        self._make = make
        self.close = close

    def keys(self) -> KeysView[str]:
        return self.header.tensors.keys()

    def paths(self) -> list[Path]:
        """None: what the tensors are made of lies elsewhere."""
        return []

    def read(self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read."""
        return self._make(name).to(device=device, dtype=dtype)

    def find_format(self, name: str) -> None:
        """Like TensorFile.find_format: none is stored in fewer bits."""
        return

    def read_stored(self, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Like TensorFile.read_stored."""
        raise InternalError(f"{name} is stored in no format of fewer bits")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return
