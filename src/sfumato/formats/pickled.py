"""Pickled checkpoints, for programs that read nothing else: plain dicts of tensors, without code to run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sfumato.common import files
from sfumato.formats.checkpoint_writer import catch_disk_full

PICKLE_SUFFIXES = {"ckpt": ".ckpt", "pt": ".pt"}  # --save_model_as -> suffix


def get_file_suffix(save_model_as: str | None) -> str:
    """The suffix of files saved in one piece."""
    return PICKLE_SUFFIXES.get(save_model_as or "", ".safetensors")


def is_pickled(path: Path) -> bool:
    return path.suffix in PICKLE_SUFFIXES.values()


def write_pickle(path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Write the tensors alone, as sd-scripts writes adapters. dtype: of floating-point tensors; None keeps theirs."""
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).clone().contiguous()
        for name, tensor in tensors.items()
    }
    with catch_disk_full(path), files.write_atomically(path) as temporary:
        torch.save(state, temporary)


@contextmanager
def convert_to_pickle(path: Path, metadata: Mapping[str, str]) -> Iterator[Path]:
    """Yield a path for the safetensors file of a model, and turn that file into a pickled one at `path` afterwards.

    The file is mapped, not read: there is no second copy of the model in memory. The metadata lies beside the tensors,
    where sd-scripts looks for the epoch and the step.
    """
    safetensors_path = path.with_name(f".{path.name}.safetensors.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield safetensors_path
        counts = {"epoch": int(metadata.get("ss_epoch", 0)), "global_step": int(metadata.get("ss_steps", 0))}
        with catch_disk_full(path), files.mark_in_use(safetensors_path), files.write_atomically(path) as temporary:
            torch.save({"state_dict": load_file(safetensors_path), **counts, **metadata}, temporary)
    finally:
        safetensors_path.unlink(missing_ok=True)
