"""Rotations by Cayley's transform, in blocks along the last dimension of a tensor: what all kinds of OFT have.

Everything is computed as a difference from the unrotated values: where a rotation is small, so are its rounding errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-8  # added to norms, as sd-scripts and LyCORIS do


def make_skew(matrices: Tensor) -> Tensor:
    """Q = A - Aᵀ of square matrices (..., n, n), in float32 at least."""
    matrices = matrices.float() if matrices.dtype.itemsize < 4 else matrices
    return matrices - matrices.transpose(-1, -2)


def limit_skew(skew: Tensor, limit: float) -> Tensor:
    """The same at a norm of at most `limit`, that of all matrices together."""
    norm = skew.norm()
    return skew * ((norm.clamp(max=limit) + NORM_EPS) / (norm + NORM_EPS))


def find_rotation_difference(skew: Tensor) -> Tensor:
    """R - I of the rotations R = (I + Q) (I - Q)⁻¹ (Qiu et al. 2023, eq. 6), which is 2 (I - Q)⁻¹ Q."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    difference, _ = torch.linalg.solve_ex(eye - skew, 2 * skew)  # which exists; to check it would wait for the device
    return difference


def find_neumann_difference(skew: Tensor) -> Tensor:
    """R - I, with the inverse as the first five terms of its Neumann series (Qiu et al. 2025, sec. 3.2), as in PEFT.

    2 Q + 2 Q² + 2 Q³ + Q⁴: no matrix is inverted, and R is a rotation as far as Q is small.
    """
    square = skew @ skew
    return 2 * (skew + square + square @ skew) + square @ square


def multiply_blocks(values: Tensor, blocks: Tensor) -> Tensor:
    """Row vectors times block-diagonal matrices: values (..., k * n), blocks (k, n, n) in any dtype."""
    count, size, _ = blocks.shape
    return torch.einsum("...kn,knm->...km", values.unflatten(-1, (count, size)), blocks.to(values.dtype)).flatten(-2)


def mix_butterfly(values: Tensor, blocks: Tensor, stage: int) -> Tensor:
    """Row vectors times the transposed blocks (k, n, n) of one stage of a butterfly.

    The rows of a block are two runs of n/2 that lie 2^stage n/2 apart.
    """
    count, size, _ = blocks.shape
    distance = 2**stage * (size // 2)
    mixed = values.unflatten(-1, (-1, 2, distance)).transpose(-1, -2).flatten(-3).unflatten(-1, (count, size))
    turned = torch.einsum("knm,...km->...kn", blocks.to(values.dtype), mixed).flatten(-2)
    return turned.unflatten(-1, (-1, distance, 2)).transpose(-1, -2).flatten(-3)
