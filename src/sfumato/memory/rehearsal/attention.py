"""Attention on the rehearsal device: outputs and log-sum-exp as flash attention keeps them, never the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

Gradients = tuple[Tensor, Tensor, Tensor]


@contextmanager
def flash_attention() -> Iterator[None]:
    """A context in which scaled_dot_product_attention on the device takes the memory of a fused kernel."""
    _define_ops()
    library = Library("aten", "IMPL", "AutogradPrivateUse1")
    library.impl("scaled_dot_product_attention", _attend, "AutogradPrivateUse1")
    try:
        yield
    finally:
        library._destroy()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, *_: Any, **__: Any
) -> Tensor:
    """(B, H, L, D), (B, H, S, D), (B, H, S, V) -> (B, H, L, V). Only shapes matter, so scale and causality do not."""
    if query.dim() == 3:
        return _attend(query[:, None], key[:, None], value[:, None], mask, dropout)[:, 0]
    if mask is not None and mask.dtype != torch.bool and mask.dtype != query.dtype:
        raise RuntimeError(f"attention: the mask is {mask.dtype}, the query {query.dtype}")
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        raise RuntimeError(f"attention: query {query.dtype}, key {key.dtype} and value {value.dtype} differ")
    if not torch.backends.cuda.flash_sdp_enabled():  # --attention math, which keeps the scores
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, dropout)[0]
    if mask is not None:
        # Fused kernels read a mask as numbers in the query's dtype, one row for each query.
        numbers = torch.zeros_like(mask, dtype=query.dtype) if mask.dtype == torch.bool else mask
        return torch.ops.sfumato_rehearsal.attend(query, key, value, numbers)[0]
    return torch.ops.sfumato_rehearsal.attend(query, key, value, None)[0]


@cache
def _define_ops() -> None:
    """Define both directions, once for the process."""

    @torch.library.custom_op("sfumato_rehearsal::attend", mutates_args=())
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        raise AssertionError("attention of the rehearsal was called with values")

    @torch.library.custom_op("sfumato_rehearsal::attend_backward", mutates_args=())
    def attend_backward(
        gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("attention of the rehearsal was called with values")

    attend.register_fake(_make_outputs)
    attend_backward.register_fake(_make_gradients)
    attend.register_autograd(_backward, setup_context=_keep_for_backward)


def _make_outputs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    # Heads beside the channels in memory, as the kernels write them: joining the heads then takes no copy.
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


def _make_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, mask: Tensor | None
) -> Gradients:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask = inputs
    ctx.save_for_backward(query, key, value, *output, mask)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sums


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    query, key, value, out, log_sums, mask = ctx.saved_tensors
    return *torch.ops.sfumato_rehearsal.attend_backward(gradient, query, key, value, out, log_sums, mask), None
