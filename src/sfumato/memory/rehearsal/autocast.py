"""Autocast on the rehearsal device: the rules that torch has for CUDA, from the tables of its autocast_mode.h."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from sfumato.memory.rehearsal.backend import DEVICE_TYPE

Rule = Callable[..., Any]
KEY = "AutocastPrivateUse1"
LOWER_PRECISION = (
    "_convolution", "_convolution.deprecated", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul",
    "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "scaled_dot_product_attention",
)  # fmt: skip
FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm",
    "logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d",
    "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "norm.Scalar",
    "norm.ScalarOpt_dim",
)  # fmt: skip
FLOAT32_OUTPUT = (  # computed and given back in float32 where no dtype is asked for; the input stays as it is
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
)  # fmt: skip
WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add", "cat", "stack",
)  # fmt: skip


@contextmanager
def autocast_rules() -> Iterator[None]:
    """A context in which torch.autocast("rehearsal", dtype) does what it does on CUDA."""
    casts = _CachedCasts()
    everything, rules = Library("_", "IMPL", KEY), Library("aten", "IMPL", KEY)
    everything.fallback(fallthrough_kernel)
    tables: dict[Callable[[Any], Rule], tuple[str, ...]] = {
        lambda op: _make_cast_rule(op, casts.to_lower_precision): LOWER_PRECISION,
        lambda op: _make_cast_rule(op, _to_float32): FLOAT32,
        _make_float32_output_rule: FLOAT32_OUTPUT,
        _make_widest_rule: WIDEST,
    }
    for make, names in tables.items():
        for name in names:
            rules.impl(name, make(_find_op(name)), KEY)
    try:
        with patch.object(torch, "clear_autocast_cache", casts.clear_with(torch.clear_autocast_cache)):
            yield
    finally:
        rules._destroy()
        everything._destroy()


class _CachedCasts:
    """Weights that were cast are kept until the outermost autocast ends, as on CUDA: it costs memory there, too."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def to_lower_precision(self, tensor: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(DEVICE_TYPE)
        if not _is_eligible(tensor) or tensor.dtype == dtype:
            return tensor
        if not (
            tensor.requires_grad and tensor.is_leaf and not tensor._is_view() and torch.is_autocast_cache_enabled()
        ):
            return tensor.to(dtype)
        known = self.copies.get(id(tensor))
        if known is None or known[0]() is not tensor:
            known = self.copies[id(tensor)] = (weakref.ref(tensor), tensor.to(dtype))
        return known[1]

    def clear_with(self, clear: Callable[[], None]) -> Callable[[], None]:
        def clear_both() -> None:
            self.copies.clear()
            clear()

        return clear_both


def _find_op(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _without_autocast() -> Any:
    keys: Any = torch._C.DispatchKey  # its annotations lack some
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(keys.AutocastPrivateUse1))


def _is_eligible(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == DEVICE_TYPE


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_eligible(tensor) else tensor


def _make_cast_rule(op: Any, cast: Callable[[Tensor], Tensor]) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return op(*args, **kwargs)

    return rule


def _make_float32_output_rule(op: Any) -> Rule:
    takes_dtype = any(argument.name == "dtype" for argument in op._schema.arguments)
    place = [argument.name for argument in op._schema.arguments].index("dtype") if takes_dtype else 0

    def rule(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            given = args[place] if len(args) > place else kwargs.get("dtype")
            if given is None and _is_eligible(args[0]):
                args, kwargs = args[:place], {**kwargs, "dtype": torch.float32}
            return op(*args, **kwargs)

    return rule


def _make_widest_rule(op: Any) -> Rule:
    def rule(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and _is_eligible(leaf)]
        dtype = torch.get_autocast_dtype(DEVICE_TYPE)
        if any(tensor.dtype == torch.float32 for tensor in tensors):
            dtype = torch.float32
        with _without_autocast():
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype) if _is_eligible(x) else x, (args, kwargs))
            return op(*args, **kwargs)

    return rule
