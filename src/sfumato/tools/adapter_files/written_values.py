"""What tools write: NaN and infinity that an input has are reported, those that a tool itself makes are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfumato.common.text import list_some, plural
from sfumato.errors import UserError
from sfumato.families.checkpoint_saving import TensorEntries, TensorEntry
from sfumato.formats.checkpoint import Checkpoint

FEW_CODES = 1 << 20  # float8 numbers that are looked at together
Origins = Sequence[tuple[Checkpoint, str]]  # files and their keys


class WrittenValues:
    """Looks at each tensor before it is written."""

    def __init__(self, progress: Callable[[int, int], None] | None = None) -> None:
        self._progress = progress
        self._broken: dict[Path, dict[str, str]] = {}  # input -> its tensors that are not finite, with their counts

    def watch(self, path: Path, entries: TensorEntries, dtype: torch.dtype | None) -> TensorEntries:
        """The same entries of a file, each of which is looked at and counted when it is made. dtype: of all."""
        by_key, done = dict(entries), [0]
        for key, entry in by_key.items():
            written = dtype if dtype and entry.spec[0].is_floating_point else entry.spec[0]
            yield key, replace(entry, make=partial(self._make, path, key, entry, written, done, len(by_key)))

    def _make(
        self, path: Path, key: str, entry: TensorEntry, dtype: torch.dtype, done: list[int], total: int
    ) -> Tensor:
        tensor = entry.make()
        self.check(path, key, tensor, dtype, entry.origins)
        done[0] += 1
        if self._progress:
            self._progress(done[0], total)
        return tensor

    def check(self, path: Path, key: str, tensor: Tensor, dtype: torch.dtype, origins: Origins = ()) -> None:
        """Look at a tensor of a file that is written as `dtype`, made of those in `origins`.

        UserError where it has NaN or infinity and none of them has, or values that the dtype cannot hold.
        """
        if not tensor.is_floating_point():
            return
        largest = find_largest(tensor)
        if largest == math.inf:
            self._find_broken(path, key, origins)
        elif largest > torch.finfo(dtype).max:
            raise UserError(
                f"{path}: {key} has a value of {largest:.3g}, beyond {dtype}",
                code="tool-value-beyond-dtype",
                fix="--save_precision bf16 or float",
            )

    def list_warnings(self) -> list[str]:
        """A line for each input that has NaN or infinity, for the report."""
        return [
            f"warning: {path} has NaN or infinity in {plural(len(counts), 'tensor')}, and so has what is written: "
            + list_some([f"{name} ({count})" for name, count in counts.items()])
            for path, counts in self._broken.items()
        ]

    def _find_broken(self, path: Path, key: str, origins: Origins) -> None:
        found = False
        for file, name in origins:
            numbers = file.read(name, dtype=torch.float32)
            count = numbers.numel() - int(numbers.isfinite().sum())
            if count:
                found = True
                counts = self._broken.setdefault(file.header.path, {})
                counts[name] = f"{count:,} of {plural(numbers.numel(), 'number')}"
        if not found:
            raise UserError(
                f"{path}: {key} would have NaN or infinity, which no input has",
                code="tool-result-not-finite",
                fix="smaller ratios; the numbers of the inputs are too large for what is computed",
            )


def find_largest(tensor: Tensor) -> float:
    """The largest absolute value, without a copy; infinite where a value is infinite or NaN."""
    if not tensor.numel():
        return 0.0
    if tensor.dtype.itemsize == 1:
        return max(_find_largest_float8(codes, tensor.dtype) for codes in tensor.flatten().split(FEW_CODES))
    low, high = tensor.aminmax()
    largest = max(abs(float(low)), abs(float(high)))
    return largest if math.isfinite(float(low)) and math.isfinite(float(high)) else math.inf


def _find_largest_float8(numbers: Tensor, dtype: torch.dtype) -> float:
    """Of float8 numbers, which torch cannot compare: without the sign, codes are in the order of what they mean."""
    codes = numbers.view(torch.uint8)
    if "fnuz" in str(dtype) and bool((codes == 128).any()):  # the code of minus zero is NaN there
        return math.inf
    largest = (codes & 127).max().view(dtype).float()
    return float(largest) if bool(largest.isfinite()) else math.inf
