"""NaN and infinity in a file of weights, found while it is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.header import DOWNLOAD_AGAIN
from sfumato.quantization.weight import QuantizedWeight

if TYPE_CHECKING:
    from sfumato.formats.checkpoint import Checkpoint


class FiniteCheck:
    """Notes the extremes of each tensor as it comes; they are looked at once, at the end, so that no tensor waits.

    NaN and infinity stay in the extremes, which cost a few percent of what reading costs, unlike a look at each number.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path = path
        self.dtype = dtype
        self._extremes: dict[str, Tensor] = {}  # key -> (2,)
        self._largest: dict[str, float] = {}  # key -> the largest magnitude that can be kept, where there is one

    def add(self, key: str, tensor: Tensor, largest: float = math.inf) -> None:
        """Types of fewer bits, which have no order in torch, and whole numbers are not looked at."""
        if isinstance(tensor, QuantizedWeight):
            return
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel():
            self._extremes[key] = torch.stack(torch.aminmax(tensor))
            if largest < math.inf:
                self._largest[key] = largest

    def finish(self, file: Checkpoint) -> None:
        """Raise UserError that names the first weight that is not finite in the file, or in the dtype that it got."""
        self._check_largest()
        if not self._extremes or torch.stack([pair.float() for pair in self._extremes.values()]).isfinite().all():
            return
        key = next(key for key, pair in self._extremes.items() if not pair.isfinite().all())
        if file.read(key, dtype=torch.float32).isfinite().all():
            raise UserError(
                f"{self.path}: {key} has numbers that {str(self.dtype).removeprefix('torch.')} cannot hold",
                code="weights-overflow",
                fix="--mixed_precision bf16",
            )
        raise UserError(
            f"{self.path}: {key} holds NaN or infinity; training on it gives nothing but NaN",
            code="weights-not-finite",
            fix=f"{DOWNLOAD_AGAIN}, or choose another version of it",
        )

    def _check_largest(self) -> None:
        """Raise UserError that names the first weight with a number that its format cannot hold."""
        if not self._largest:
            return
        tops = torch.stack([self._extremes[key].float().abs().max() for key in self._largest]).tolist()
        for (key, largest), top in zip(self._largest.items(), tops, strict=True):
            if largest < top < math.inf:
                raise UserError(
                    f"{self.path}: {key} has numbers up to {top:g}, and float8 without scales ends at {largest:g}",
                    code="weights-overflow-float8",
                    fix="--fp8_scaled",
                )
