"""Adding up gradients over processes, in few messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

BUCKET_SIZE = 1 << 26  # elements in one message
AddUp = Callable[[Tensor], None]  # sums a tensor over all processes, in place


class Facts(NamedTuple):
    """What processes let each other know with every sum."""

    stop: bool = False  # one was asked to stop
    failed: bool = False  # one cannot go on


def sum_gradients(parameters: Sequence[nn.Parameter], loss: Tensor, own: Facts, add_up: AddUp) -> Tensor:
    """Sum every gradient, and the 0-d loss, in place. Gives the summed facts, (2,), on the device of the loss."""
    has_gradient = [p.grad is not None for p in parameters]
    first = parameters[0].dtype if parameters else torch.float32
    wide = torch.promote_types(first, torch.float32)  # in which sums are made
    flags = torch.tensor([*own, *has_gradient], dtype=loss.dtype).to(loss.device, non_blocking=True)
    head = torch.cat([loss.flatten(), flags]).to(wide)
    summed = head
    for bucket in split_into_buckets(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([head, *(gradient.flatten() for gradient in gradients)])
        add_up(flat)
        summed, *pieces = flat.split([len(head), *(gradient.numel() for gradient in gradients)])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    loss.copy_(summed[0])
    counts = has_gradient if all(has_gradient) else summed[1 + len(own) :].tolist()
    for parameter, count in zip(parameters, counts, strict=True):
        parameter.grad = parameter.grad if count else None
    return summed[1 : 1 + len(own)]


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
