"""Attention in the compute dtype: norms of queries and keys that do not widen them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ATTENTION_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")  # diffusers' names of them


def keep_attention_dtype(network: nn.Module) -> None:
    """Let the norms of queries and keys give back the dtype that they get, as they do without autocast.

    Autocast on CUDA makes the output of a norm float32, and diffusers' attention then gives its own output in float32,
    too: the largest tensors of a block would take twice the memory. The norms still compute in float32.
    """
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in ATTENTION_NORMS:
            module.register_forward_hook(restore_dtype)


def restore_dtype(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Tensor:
    return output.to(args[0].dtype)
