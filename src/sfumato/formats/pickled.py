"""Checkpoints as torch pickles them, for programs that read nothing else: plain dicts of tensors, nothing to run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sfumato.common import files
from sfumato.formats.checkpoint import room_for

ENDINGS = {"ckpt": ".ckpt", "pt": ".pt"}  # --save_model_as -> what such a file's name ends in


def is_pickled(path: Path) -> bool:
    return path.suffix in ENDINGS.values()


def write_flat(path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Nothing but tensors, as the field keeps adapters. dtype: what floating-point tensors become in the file."""
    found = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).clone().contiguous()
        for name, tensor in tensors.items()
    }
    with room_for(path), files.atomic(path) as temporary:
        torch.save(found, temporary)


@contextmanager
def repacked(path: Path, metadata: Mapping[str, str]) -> Iterator[Path]:
    """A place for a safetensors file, which becomes a whole model's pickled file at `path` in the end.

    It is mapped and not read, so that the model is never in memory a second time. Metadata stand beside the tensors,
    where the field looks for the epoch and the step.
    """
    place = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield place
        counts = {"epoch": int(metadata.get("ss_epoch", 0)), "global_step": int(metadata.get("ss_steps", 0))}
        with room_for(path), files.atomic(path) as temporary:
            torch.save({"state_dict": load_file(place), **counts, **metadata}, temporary)
    finally:
        place.unlink(missing_ok=True)
