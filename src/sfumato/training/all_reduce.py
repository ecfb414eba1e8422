"""Adding up gradients over processes, in few messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from sfumato.errors import UserError

BUCKET_SIZE = 1 << 26  # elements in one message


class ProcessFailed(UserError):
    """Another process of the run has failed, or does not answer any more."""


class Flags(NamedTuple):
    """What processes let each other know with every sum."""

    stop: bool = False  # one was asked to stop
    failed: bool = False  # one cannot go on


def sum_tensor(tensor: Tensor) -> None:
    """Sum a tensor over all processes, in place. ProcessFailed where one of them has ended."""
    try:
        distributed.all_reduce(tensor)
    except RuntimeError as error:  # gloo's and NCCL's own errors are of this class
        raise ProcessFailed(
            "another process of this run has ended",
            code="process-ended",
            fix="its own last message says why; --debug shows what this process saw",
        ) from error


def read_flags(summed: Tensor) -> Flags:
    """The flags that any process has raised. summed: (2,), their sum. ProcessFailed where one has failed."""
    flags = Flags(*(count > 0 for count in summed.tolist()))
    if flags.failed:
        raise ProcessFailed(
            "another process of this run has failed", code="process-failed", fix="its own last message says why"
        )
    return flags


def sum_over_processes(parameters: Sequence[nn.Parameter], loss: Tensor, flags: Flags) -> Tensor:
    """Sum every gradient, and the 0-d loss, in place; each process has divided by the real samples of all.

    A parameter that got a gradient in no process keeps none, so that the optimizer skips it as it does alone.
    flags: of this process. Gives their sum over all, (2,), for `read_flags`.
    """
    has_gradient = [p.grad is not None for p in parameters]
    wide = torch.promote_types(parameters[0].dtype, torch.float32)  # in which sums are made
    own = torch.tensor([*flags, *has_gradient], dtype=loss.dtype).to(loss.device, non_blocking=True)
    facts = torch.cat([loss.flatten(), own]).to(wide)
    summed = facts
    for bucket in split_into_buckets(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([facts, *(gradient.flatten() for gradient in gradients)])
        sum_tensor(flat)
        summed, *pieces = flat.split([len(facts), *(gradient.numel() for gradient in gradients)])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    loss.copy_(summed[0])
    counts = has_gradient if all(has_gradient) else summed[1 + len(flags) :].tolist()
    for parameter, count in zip(parameters, counts, strict=True):
        parameter.grad = parameter.grad if count else None
    return summed[1 : 1 + len(flags)]


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
