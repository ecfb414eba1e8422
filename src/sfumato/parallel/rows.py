"""Tensors that are shared out by their first dimension: equal pieces, the last ones shorter or empty (torch.chunk)."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def count_piece_rows(total: int, processes: int) -> int:
    """Of each piece but the last ones."""
    return -(-total // processes)


def slice_rows(whole: Tensor, rank: int, processes: int) -> Tensor:
    """The piece of this rank, a view."""
    rows = count_piece_rows(len(whole), processes)
    return whole[rank * rows : (rank + 1) * rows]


def as_rows_of(own: Tensor, like: torch.Size, mesh: DeviceMesh) -> DTensor:
    """The tensor of the shape `like` of which this process has the rows `own`; nothing is copied or sent."""
    strides = torch.empty(like, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=like, stride=strides)


def gather_rows(shared: DTensor, device: torch.device) -> Tensor:
    """The whole tensor, on the device of the sums; all processes call it at the same time.

    Costs one whole tensor and its pieces there. Raises RuntimeError where another process is gone.
    """
    own, processes = shared.to_local().detach(), distributed.get_world_size()
    rows, rest = count_piece_rows(shared.shape[0], processes), shared.shape[1:]
    piece = torch.zeros((rows, *rest), dtype=own.dtype, device=device)
    piece[: len(own)] = own
    whole = torch.empty((processes * rows, *rest), dtype=own.dtype, device=device)
    distributed.all_gather_into_tensor(whole.view(torch.uint8), piece.view(torch.uint8))  # of any dtype, bit for bit
    return whole[: shared.shape[0]]
