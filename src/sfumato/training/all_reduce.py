"""Adding up gradients over processes, in few messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as distributed
from torch import Tensor, nn

BUCKET_SIZE = 1 << 26  # elements in one message


def sum_over_processes(parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
    """Sum every gradient, and the 0-d loss, in place; each process has divided by the real samples of all.

    A parameter that got a gradient in no process keeps none, so that the optimizer skips it as it does alone.
    """
    has_gradient = [p.grad is not None for p in parameters]
    wide = torch.promote_types(parameters[0].dtype, torch.float32)  # in which sums are made
    facts = torch.cat([loss.flatten(), loss.new_tensor(has_gradient)]).to(wide)
    summed = facts
    for bucket in split_into_buckets(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([facts, *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(flat)
        summed, *pieces = flat.split([len(facts), *(gradient.numel() for gradient in gradients)])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    loss.copy_(summed[0])
    counts = has_gradient if all(has_gradient) else summed[1:].tolist()
    for parameter, count in zip(parameters, counts, strict=True):
        parameter.grad = parameter.grad if count else None


def split_into_buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, as many at a time as make one message."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > BUCKET_SIZE:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    yield bucket
