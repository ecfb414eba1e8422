"""Which kernel computes the denoiser's attention: torch's own, or that of a package, with the same numbers."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sfumato.config.memory import MemoryOptions
from sfumato.errors import InternalError, UserError
from sfumato.families.blueprint import Blueprint

# torch's kernels, the preferred one first: cuDNN's does not take every size of head.
TORCH_KERNELS = {
    "cudnn": [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    ],
    "math": [SDPBackend.MATH],
}  # fmt: skip

MASK_ALIGNMENT = 8  # numbers in a row of xformers' masks

# query, key, value (B, L, H, D), mask, scale -> (B, L, H, D)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionPackage:
    """A package with a kernel of its own."""

    name: str
    module: str  # with its function
    install: str
    load: Callable[[Any], Attend]  # from the module
    takes_masks: bool
    half_precision_only: bool


def load_flash(module: Any) -> Attend:
    kernel = module.flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, scale: float | None) -> Tensor:
        return kernel(query, key, value, softmax_scale=scale)

    return attend


def load_flash_3(module: Any) -> Attend:
    """Of diffusers' own operators around it one has no gradients, the other waits for the device."""
    kernel = module.flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, scale: float | None) -> Tensor:
        output = kernel(query, key, value, softmax_scale=scale)
        return output[0] if isinstance(output, tuple) else output  # older releases give the log-sum-exp, too

    return attend


def load_xformers(module: Any) -> Attend:
    """With (B, 1, 1, S) masks, bool or numbers to add; diffusers' dispatcher would add bool ones as 0 and 1."""
    kernel = module.memory_efficient_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        if mask is None:
            return kernel(query, key, value, scale=scale)
        length = key.shape[1]
        aligned = math.ceil(length / MASK_ALIGNMENT) * MASK_ALIGNMENT
        rows = query.new_zeros(*mask.shape[:-1], aligned)[..., :length]
        rows = rows.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else rows.copy_(mask)
        bias = rows.expand(query.shape[0], query.shape[2], query.shape[1], length)
        return kernel(query, key, value, attn_bias=bias, scale=scale)

    return attend


PACKAGES = {
    "flash": AttentionPackage(
        name="flash-attn", module="flash_attn", install="pip install flash-attn", load=load_flash,
        takes_masks=False, half_precision_only=True,
    ),
    "flash_3": AttentionPackage(
        name="FlashAttention 3", module="flash_attn_interface", install="build the hopper folder of flash-attention",
        load=load_flash_3, takes_masks=False, half_precision_only=True,
    ),
    "xformers": AttentionPackage(
        name="xformers", module="xformers.ops", install="pip install xformers", load=load_xformers,
        takes_masks=True, half_precision_only=False,
    ),
}  # fmt: skip


def check_attention(memory: MemoryOptions, blueprint: Blueprint) -> Iterator[str]:
    """Raise UserError where --attention cannot be had; a line for an older switch in whose place torch's is used."""
    obstacle, fix = find_attention_obstacle(memory.wanted_attention, memory, masked=blueprint.masks_attention)
    if obstacle and memory.attention is not None:
        raise UserError(
            f"--attention {memory.attention}: {obstacle}",
            code="attention-unusable",
            fix=f"{fix}--attention sdpa, which gives the same numbers",
        )
    if obstacle:
        yield f"--attention sdpa is used instead of {memory.wanted_attention}, with the same numbers: {obstacle}"


def find_attention_obstacle(name: str, memory: MemoryOptions, *, masked: bool) -> tuple[str, str]:
    """Why it cannot be used here, and what could be done first; empty where it can."""
    package = PACKAGES.get(name)
    if package is None:
        if name == "cudnn" and not torch.cuda.is_available():
            return "cuDNN needs an NVIDIA GPU, and there is none here", ""
        return "", ""
    if not is_installed(package.module.partition(".")[0]):
        return f"{package.name} is not installed", f"{package.install}, or "
    if package.half_precision_only and memory.mixed_precision == "no":
        return "its kernel computes in half precision alone", "--mixed_precision bf16, or "
    if masked and not package.takes_masks:
        return "its kernel takes no mask, and this model masks the padding of captions", ""
    if not torch.cuda.is_available():
        return "its kernel needs an NVIDIA GPU, and there is none here", ""
    return "", ""


@cache
def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def choose_attention(memory: MemoryOptions, *, masked: bool) -> str:
    """The kernel that a run uses: that of an older switch only where it can be had."""
    name = memory.wanted_attention
    return "sdpa" if find_attention_obstacle(name, memory, masked=masked)[0] else name


def wrap_attention(network: nn.Module, name: str) -> None:
    """Let the attention layers of a network of diffusers compute with a kernel. "sdpa": as they are.

    Each layer's forward is wrapped, so that it holds in what runs again in backward, too.
    """
    if name == "sdpa":
        return
    for module in network.modules():
        if hasattr(module, "set_processor"):
            module.forward = compute_with(name, module.forward)


def compute_with(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward whose scaled_dot_product_attention is computed by this kernel."""
    make_context = prepare_context(name)

    @wraps(forward)
    def forward_with_kernel(*args: Any, **kwargs: Any) -> Any:
        with make_context():
            return forward(*args, **kwargs)

    return forward_with_kernel


def prepare_context(name: str) -> Callable[[], AbstractContextManager[Any]]:
    if name in TORCH_KERNELS:
        return partial(sdpa_kernel, TORCH_KERNELS[name], set_priority=len(TORCH_KERNELS[name]) > 1)
    package = PACKAGES[name]
    return partial(PackageAttention, package.load(importlib.import_module(package.module)))


class PackageAttention(TorchFunctionMode):
    """Sends torch's attention to a package, whatever calls it."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return attend_heads_first(self.attend, *args, **kwargs)


def attend_heads_first(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's signature and order of dimensions, (B, H, L, D), around a package's function."""
    if query.device.type not in ("cuda", "cpu"):  # a rehearsal, where every fused kernel needs the same memory
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if dropout_p or is_causal:
        raise InternalError("a denoiser's attention has neither dropout nor an order")
    if enable_gqa:  # fewer heads of key and value than of the query
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, scale).transpose(1, 2)
