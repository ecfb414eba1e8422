"""The tensors of an adapter file in numbers, whatever program wrote it, and whether it can be used."""

from __future__ import annotations

from pathlib import Path

import torch

from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.formats.adapter_file import find_adapter_files
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.tools.adapter_files.inspect import inspect_adapter

MATRIX_ENDS = ("up.weight", "down.weight", "_A.weight", "_B.weight")


@torch.no_grad()
def check_adapter(path: Path, *, all_keys: bool = False) -> tuple[list[str], bool]:
    """The lines of the report, and whether the file can be used as it is.

    all_keys: every tensor, and not only the matrices of low-rank adapters.
    """
    lines: list[str] = []
    for file, _ in find_adapter_files(path):
        with open_checkpoint(file) as checkpoint:
            keys = [key for key in checkpoint.header.tensors if all_keys or key.endswith(MATRIX_ENDS)]
            lines.append(f"{file}: {plural(len(checkpoint.header.tensors), 'tensor')}, {len(keys)} shown")
            for key in keys:
                lines.append(describe_tensor(key, checkpoint.read(key)))
    try:
        problems = list(inspect_adapter(path).problems)
    except UserError as error:
        problems = [str(error)]
    return [*lines, *(f"problem: {problem}" for problem in problems)], not problems


def describe_tensor(key: str, tensor: torch.Tensor) -> str:
    """Shape, dtype, and the size of its values."""
    shape = "x".join(map(str, tensor.shape)) or "1"
    if not tensor.numel():
        return f"{key}: {shape} {tensor.dtype}, no values"
    values = tensor.float().abs()
    nonfinite = int((~values.isfinite()).sum())
    more = f", {nonfinite} NAN OR INFINITE" if nonfinite else ""
    dtype = str(tensor.dtype).removeprefix("torch.")
    sizes = f"mean {values.mean():.4g}, smallest {values.min():.4g}, largest {values.max():.4g}"
    return f"{key}: {shape} {dtype}, {sizes}{more}"
