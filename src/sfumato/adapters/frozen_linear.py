"""A frozen linear layer and a low-rank change in one node of the graph, which saves four passes over full-size tensors.

As two branches, autograd makes the change, its sum with the output, the change's own gradient of the input and the sum
of both gradients: each a tensor of the layer's size, read and written. Here both products add in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def can_fuse(layer: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether `output` is what this layer, plain and frozen, has computed from x in one dtype.

    Another hook or another forward would have put a graph of its own behind the output. The compiler fuses by itself.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or len(layer._forward_hooks) != 1:
        return False
    if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        return False
    same_dtype = layer.weight.dtype == x.dtype == output.dtype
    return same_dtype and output.is_contiguous() and not torch.compiler.is_compiling()


def add_low_rank(output: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """output (..., O) of a frozen layer for x (..., I), plus up (O, r) @ down (r, I) @ x; overwrites `output`.

    The gradient of x includes the layer's own, since the node replaces the one behind `output`.
    """
    return _LowRank.apply(output.detach(), x, weight, down, up)  # pyright: ignore


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.t()
        output.view(-1, output.shape[-1]).addmm_(low, up.t())
        ctx.mark_dirty(output)
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, low, weight, down, up)
        ctx.shape = x.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        rows, low, weight, down, up = ctx.saved_tensors
        grad_output = gradients[0].reshape(-1, len(up))
        grad_low = grad_output @ up
        _, needs_x, _, needs_down, needs_up = ctx.needs_input_grad
        grad_x = (grad_output @ weight).addmm_(grad_low, down).view(ctx.shape) if needs_x else None
        grad_down = grad_low.t() @ rows if needs_down else None
        grad_up = (low.t() @ grad_output).t() if needs_up else None
        return None, grad_x, None, grad_down, grad_up
