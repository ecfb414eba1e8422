"""Memory of the rehearsal device: bytes of every live storage, the peak, and what was there at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, UntypedStorage, nn

from sfumato.memory.rehearsal.places import find_origin
from sfumato.quantization.weight import list_stored


class LiveTensor(NamedTuple):
    """A tensor that was on the device at the peak."""

    size: int  # bytes
    dtype: str
    shape: tuple[int, ...]
    origin: str  # a parameter's name, the module that made it, "backward", or file:line


@dataclass(frozen=True, kw_only=True)
class _Change:
    """One storage that came (size above 0) or went."""

    storage: int  # its number
    size: int  # bytes


class MemoryMeter:
    """Counts storages, so views and tied weights count once. Sizes are in bytes and not rounded up to blocks."""

    def __init__(self) -> None:
        self.allocated = 0
        self.peak = 0
        self._count = 0
        self._numbers: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}  # id of a live storage -> its number
        self._tensors: dict[int, LiveTensor] = {}  # number -> the tensor that it was made as
        self._changes: list[_Change] = []  # since the last reset
        self._live_at_reset: set[int] = set()
        self._changes_at_peak = 0
        self._module_names: dict[int, str] = {}

    def name_modules(self, networks: Mapping[str, nn.Module]) -> None:
        """Give parameters, and from now on what these modules make, their names; other modules have none any more.

        Call again once parameters have moved or were replaced.
        """
        self._module_names = {}  # of modules that are gone, whose ids others may get
        for part, network in networks.items():
            for name, module in network.named_modules():
                self._module_names[id(module)] = f"{part}.{name}" if name else part
            for name, parameter in network.named_parameters():
                for stored in list_stored([parameter]):
                    number = self._find_number(stored)
                    if number is not None:
                        self._tensors[number] = self._tensors[number]._replace(origin=f"{part}.{name}")

    def count(self, tensor: Tensor) -> None:
        """A tensor that an operator gave back; counts where its storage is new."""
        if self._find_number(tensor) is not None:
            return
        storage = tensor.untyped_storage()
        number, size = self._count, storage.nbytes()
        self._count += 1
        key = id(storage)
        self._numbers[key] = (weakref.ref(storage, lambda _: self._release(key, number, size)), number)
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        self._tensors[number] = LiveTensor(size, dtype, shape, find_origin(self._module_names))
        self._changes.append(_Change(storage=number, size=size))
        self.allocated += size
        if self.allocated > self.peak:
            self.peak, self._changes_at_peak = self.allocated, len(self._changes)

    def reset_peak(self) -> None:
        """Start a stage: its peak begins at what is there now."""
        self._live_at_reset = {number for _, number in self._numbers.values()}
        self._tensors = {number: self._tensors[number] for number in self._live_at_reset}
        self._changes = []
        self.peak, self._changes_at_peak = self.allocated, 0

    def list_peak(self) -> list[LiveTensor]:
        """All that was on the device at the peak, largest first."""
        live = set(self._live_at_reset)
        for change in self._changes[: self._changes_at_peak]:
            if change.size > 0:
                live.add(change.storage)
            else:
                live.discard(change.storage)
        return sorted((self._tensors[number] for number in live), key=lambda tensor: -tensor.size)

    def sum_storages(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those among the tensors that are on the device, each storage once."""
        numbers = {self._find_number(tensor) for tensor in list_stored(tensors)}
        return sum(self._tensors[number].size for number in numbers if number is not None)

    def find_numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers of the tensors' storages, without those that are not on the device."""
        return {number for tensor in tensors if (number := self._find_number(tensor)) is not None}

    def list_from(self, origin: str) -> set[int]:
        """The numbers of the storages of this stage whose origin begins so."""
        return {number for number, tensor in self._tensors.items() if tensor.origin.startswith(origin)}

    def list_casts(self, weights: Iterable[tuple[str, tuple[int, ...]]]) -> set[int]:
        """The numbers of copies of weights that their own modules made. weights: name of the module, shape."""
        known = set(weights)
        return {number for number, tensor in self._tensors.items() if (tensor.origin, tensor.shape) in known}

    def replay(self, parts: Mapping[int, float]) -> int:
        """The peak of the stage in bytes if of some storages, by number, only a part were there."""
        allocated = peak = sum(self._tensors[number].size * parts.get(number, 1.0) for number in self._live_at_reset)
        for change in self._changes:
            allocated += change.size * parts.get(change.storage, 1.0)
            peak = max(peak, allocated)
        return int(peak)

    def _find_number(self, tensor: Tensor) -> int | None:
        storage = tensor.untyped_storage()
        known = self._numbers.get(id(storage))
        return known[1] if known is not None and known[0]() is storage else None

    def _release(self, key: int, number: int, size: int) -> None:
        if key in self._numbers and self._numbers[key][1] == number:
            del self._numbers[key]
        self._changes.append(_Change(storage=number, size=-size))
        self.allocated -= size
