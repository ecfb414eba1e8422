"""Tensors of every dtype for the tests of checkpoints."""

import torch

from sfumato.formats.checkpoint import SAFETENSORS_DTYPES

FLOATS = [dtype for dtype in SAFETENSORS_DTYPES.values() if dtype.is_floating_point]


def make_tensors():
    """One tensor of every dtype, with unsorted names and unusual shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, dtype in enumerate(SAFETENSORS_DTYPES.values()):
        shape = [(3, 5), (), (0, 4), (7,), (2, 3, 2, 2)][i % 5]
        tensors[f"{'zyx'[i % 3]}.{i}"] = (torch.randn(shape, generator=generator) * 4).to(dtype)
    return tensors


def are_same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(view_bytes(a), view_bytes(b))


def view_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)
