"""NaN and infinity in a file of weights, found while it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.header import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from sfumato.formats.checkpoint import Checkpoint


class FiniteCheck:
    """Sums up each tensor as it comes; the sums are looked at once, at the end, so that no tensor waits for a device.

    A norm costs a small part of what reading costs, unlike a look at each element; NaN and infinity stay in it.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path = path
        self.dtype = dtype
        self._norms: dict[str, Tensor] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Types of eight bits, which have no norm, and whole numbers are not looked at."""
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel():
            self._norms[key] = torch.linalg.vector_norm(tensor)

    def finish(self, file: Checkpoint) -> None:
        """Raise UserError that names the first weights that are not finite in the file, or in the dtype they got."""
        norms = torch.stack([norm.float() for norm in self._norms.values()]) if self._norms else torch.zeros(1)
        if norms.isfinite().all():
            return
        for key, norm in self._norms.items():
            if norm.isfinite() or file.read(key, dtype=self.dtype).isfinite().all():
                continue  # a norm may exceed its dtype where no weight does
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
