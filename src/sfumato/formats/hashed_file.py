"""Files of adapters and of words as they are written: with the hashes by which sd-scripts and web UIs name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.formats.checkpoint_writer import write_safetensors
from sfumato.formats.hashes import add_hashes
from sfumato.formats.pickled import is_pickled, write_pickle


def write_hashed_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """A safetensors file with sd-scripts' two hashes, or the tensors alone in a pickled one, as `path` ends.

    dtype: of all floating-point tensors; None leaves them as they are.
    """
    if is_pickled(path):
        write_pickle(path, tensors, dtype=dtype)
    else:
        write_safetensors(path, tensors, add_hashes(metadata, tensors, dtype=dtype), dtype=dtype)
