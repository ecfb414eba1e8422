"""A frozen weight in fewer bits that torch, diffusers and adapters use like any other: a tensor with its own dispatch.

Its shape and dtype are those of the weight that is meant. What reads it decodes it for that moment, in backward too, so
that nothing but the stored tensors is kept; matrix products may compute with the stored numbers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sfumato.quantization.weight_format import Stored, WeightFormat

aten = torch.ops.aten
Handler = Callable[..., Any]
_HANDLERS: dict[Any, Handler] = {}


class QuantizedWeight(Tensor):
    """A weight (N, K) or (N, C, H, W), or the transpose of one (N, K)."""

    stored: dict[str, Tensor]  # by the names of its format; what they are may change, e.g. while they visit a device
    format: WeightFormat
    is_transposed: bool

    @staticmethod
    def __new__(
        cls, format: WeightFormat, stored: Stored, shape: Sequence[int], dtype: torch.dtype, transposed: bool = False
    ) -> QuantizedWeight:
        """shape: of the weight before it is transposed."""
        outer = tuple(shape[::-1] if transposed else shape)
        first = stored[format.names[0]]
        made = torch.Tensor._make_wrapper_subclass(cls, outer, dtype=dtype, device=first.device)  # pyright: ignore
        made.format, made.stored, made.is_transposed = format, dict(stored), transposed
        return cast(QuantizedWeight, made)

    def __init__(self, *_: object, **__: object) -> None:
        """All is done in __new__, as torch wants it of tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight that is stored."""
        return tuple(self.shape[::-1] if self.is_transposed else self.shape)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a plain tensor."""
        dense = self.format.decode(self.stored, self.weight_shape, dtype or self.dtype)
        return dense.t() if self.is_transposed else dense

    def like(self, stored: Stored, *, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Self:
        """Another weight of the same format."""
        made = type(self)(self.format, stored, shape or self.weight_shape, dtype or self.dtype, self.is_transposed)
        return cast(Self, made)

    def map_stored(self, change: Callable[[Tensor], Tensor], *, dtype: torch.dtype | None = None) -> Self:
        """The same weight with each stored tensor changed, e.g. moved."""
        return self.like({name: change(tensor) for name, tensor in self.stored.items()}, dtype=dtype)

    def __repr__(self, **_: object) -> str:
        return f"QuantizedWeight({self.format.label}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> Tensor:
        """The stored tensors as attributes, which torch wants of tensors made of tensors."""
        if name.startswith("stored_") and name[7:] in self.stored:
            return self.stored[name[7:]]
        raise AttributeError(name)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """torch's protocol for tensors made of tensors, for compiling and moving."""
        names = [f"stored_{name}" for name in self.stored]
        return names, (self.format, self.weight_shape, self.dtype, self.is_transposed)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: Any, *_: object) -> QuantizedWeight:
        own_format, shape, dtype, transposed = context
        stored = {name.removeprefix("stored_"): tensor for name, tensor in inner.items()}
        return QuantizedWeight(own_format, stored, shape, dtype, transposed)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], QuantizedWeight):
            return handler(*args, **kwargs)
        if func is aten.cat.default and can_join(*args):
            return _join_rows(args[0])
        product = _PRODUCTS.get(func)
        if product is not None and isinstance(args[-1], QuantizedWeight):
            return product(*args, **kwargs)
        args, kwargs = tree_map_only(QuantizedWeight, lambda weight: weight.decode(), (args, kwargs))
        return func(*args, **kwargs)


def quantize(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """A weight (N, ...) in another format, with its own dtype as that of what is computed with it."""
    return QuantizedWeight(format, format.encode(weight), weight.shape, weight.dtype)


def keep_in_format(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """A weight as it came from its file in this format; one that has the same numbers already keeps them."""
    if not isinstance(weight, QuantizedWeight):
        return quantize(weight, format)
    if weight.format.has_numbers_of(format):
        return QuantizedWeight(format, weight.stored, weight.weight_shape, weight.dtype)
    return QuantizedWeight(format, format.encode(weight.decode(torch.float32)), weight.weight_shape, weight.dtype)


def list_stored(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that are in memory: for a quantized weight its stored ones, which have no others inside."""
    for tensor in tensors:
        if isinstance(tensor, QuantizedWeight):
            yield from tensor.stored.values()
        else:
            yield tensor


# ---------------------------------------------------------------- operators


def _handle(*operators: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return register


@_handle(aten.detach.default, aten.alias.default)
def _detach(weight: QuantizedWeight) -> QuantizedWeight:
    return weight.map_stored(torch.Tensor.detach)


@_handle(aten.clone.default)
def _clone(weight: QuantizedWeight, **_: object) -> QuantizedWeight:
    return weight.map_stored(torch.clone)


@_handle(aten.empty_like.default)
def _empty_like(weight: QuantizedWeight, *, device: Any = None, pin_memory: bool = False, **_: object) -> Any:
    return weight.map_stored(lambda each: torch.empty_like(each, device=device, pin_memory=pin_memory))


@_handle(aten.t.default)
def _transpose(weight: QuantizedWeight) -> QuantizedWeight:
    transposed = not weight.is_transposed
    return QuantizedWeight(weight.format, weight.stored, weight.weight_shape, weight.dtype, transposed)


@_handle(aten.transpose.int)
def _transpose_dimensions(weight: QuantizedWeight, first: int, second: int) -> Tensor:
    if weight.ndim == 2 and {first % 2, second % 2} == {0, 1}:
        return _transpose(weight)
    return weight.decode().transpose(first, second)


@_handle(aten._to_copy.default)
def _to_copy(weight: QuantizedWeight, *, dtype: Any = None, device: Any = None, **more: Any) -> Tensor:
    """To another device as it is. To another dtype decoded, which then rounds once."""
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(weight.shape, dtype=dtype or weight.dtype, device="meta")
    non_blocking = more.get("non_blocking", False)
    moved = weight if device is None else weight.map_stored(lambda each: each.to(device, non_blocking=non_blocking))
    return moved if dtype is None or dtype == weight.dtype else moved.decode(dtype)


@_handle(aten.copy_.default)
def _copy(weight: QuantizedWeight, source: Tensor, non_blocking: bool = False) -> QuantizedWeight:
    """From another weight of the same format as it is, from any other tensor rounded to this format."""
    if isinstance(source, QuantizedWeight) and source.format == weight.format:
        new = source.stored
    else:
        dense = source.decode(torch.float32) if isinstance(source, QuantizedWeight) else source
        new = weight.format.encode((dense.t() if weight.is_transposed else dense).to(weight.device))
    for name, tensor in weight.stored.items():
        tensor.copy_(new[name], non_blocking=non_blocking)
    return weight


@_handle(aten.split_with_sizes.default)
def _split(weight: QuantizedWeight, sizes: Sequence[int], dim: int = 0) -> Any:
    if dim != 0 or weight.is_transposed:
        return aten.split_with_sizes.default(weight.decode(), sizes, dim)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [_take_rows(weight, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


@_handle(aten.split.Tensor)
def _split_evenly(weight: QuantizedWeight, size: int, dim: int = 0) -> Any:
    count = weight.shape[dim]
    return _split(weight, [min(size, count - start) for start in range(0, count, size)], dim)


@_handle(aten.slice.Tensor)
def _slice(weight: QuantizedWeight, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    if dim != 0 or weight.is_transposed or step != 1:
        return aten.slice.Tensor(weight.decode(), dim, start, end, step)
    return _take_rows(weight, slice(start, end))


def _take_rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    height = len(range(*rows.indices(weight.weight_shape[0])))
    stored = weight.format.take_rows(weight.stored, rows)
    return weight.like(stored, shape=(height, *weight.weight_shape[1:]))


def can_join(weights: Sequence[Tensor], dim: int = 0) -> bool:
    """Whether weights below each other are one of their format."""
    formats = {each.format for each in weights if isinstance(each, QuantizedWeight) and not each.is_transposed}
    return dim == 0 and len(formats) == 1 and all(isinstance(each, QuantizedWeight) for each in weights)


def _join_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    first = weights[0]
    stored = {name: torch.cat([each.stored[name] for each in weights]) for name in first.stored}
    return first.like(stored, shape=(sum(each.weight_shape[0] for each in weights), *first.weight_shape[1:]))


def _multiply(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x (M, K) @ a transposed weight, as in forward, or x (M, N) @ a weight, as in backward."""
    if isinstance(x, QuantizedWeight):
        return x.decode() @ weight
    product = weight.format.multiply if weight.is_transposed else weight.format.multiply_back
    return product(x, weight.stored, weight.weight_shape, x.dtype)


def _add_product(bias: Tensor, x: Tensor, weight: QuantizedWeight, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    if not weight.format.computes and not isinstance(x, QuantizedWeight):
        return torch.addmm(bias, x, weight.decode(x.dtype), beta=beta, alpha=alpha)
    return torch.add(beta * bias if beta != 1 else bias, _multiply(x, weight), alpha=alpha)


_PRODUCTS: dict[Any, Handler] = {aten.mm.default: _multiply, aten.addmm.default: _add_product}
