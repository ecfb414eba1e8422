"""For kinds that form the whole change of a weight: their tensors, its product with the input, dropout of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.adapters.base import Adapter, apply_weight, drop_module
from sfumato.data.batch import Tensors
from sfumato.formats.adapter_keys import ALPHA
from sfumato.formats.groups import Layer, LayerGroup


def make_zeros(group: LayerGroup, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """A tensor of each shape, on the CPU, where values are drawn, or on the meta device with the group's layers."""
    device = "meta" if group.layers[0].weight.is_meta else "cpu"
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


def add_parameters(adapter: Adapter, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """A parameter of each name, on the layers' device; None where there is no tensor of the name."""
    device = adapter.group.layers[0].weight.device
    for name in names:
        value = tensors.get(name)
        adapter.register_parameter(name, None if value is None else nn.Parameter(value.to(device)))


def export_parameters(adapter: Adapter) -> Tensors:
    """All parameters under their own names, and alpha."""
    return {**dict(adapter.named_parameters()), ALPHA: torch.tensor(float(adapter.alpha))}


def apply_formed(layer: Layer, x: Tensor, form: Callable[[], Tensor]) -> Tensor:
    """The layer's operation with the weight that `form` gives; formed again in backward, so that none is kept."""

    def apply(x: Tensor) -> Tensor:
        return apply_weight(layer, x, form().to(x.dtype))

    if not torch.is_grad_enabled():
        return apply(x)
    change = checkpoint(apply, x, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(change, Tensor)
    return change


def drop_rows(adapter: Adapter, change: Tensor, i: int) -> Tensor:
    """The change of the i-th layer's output with the adapter's dropout: of rows for the whole batch, and of it all."""
    dropout = adapter.dropout
    if not adapter.training or not dropout:
        return change
    if dropout.rank:
        is_linear = isinstance(adapter.group.layers[i], nn.Linear)
        count = change.shape[-1 if is_linear else 1]
        mask = (torch.rand(count, device=change.device) >= dropout.rank).to(change.dtype)
        if dropout.scales_rows:
            mask = mask / mask.mean().clamp(min=1 / count)  # of rows that are all dropped, too
        change = change * (mask if is_linear else mask.reshape(-1, 1, 1))
    return drop_module(change, dropout.module) if dropout.module else change


def measure_change(adapter: Adapter) -> Tensor:
    """The norm of the change of all layers, 0-d."""
    squares = [adapter.delta(i).float().square().sum() for i in range(len(adapter.group.layers))]
    return torch.stack(squares).sum().sqrt()


def limit_product(adapter: Adapter, maximum: float) -> tuple[Tensor, Tensor]:
    """`Adapter.limit_norm` where the change is linear in each parameter: all are scaled by one root of the ratio."""
    norm = measure_change(adapter)
    ratio = (maximum / norm.clamp(min=maximum / 2)).clamp(max=1)
    factors = list(adapter.parameters())
    for factor in factors:
        factor.mul_(ratio ** (1 / len(factors)))
    return norm * ratio, ratio < 1
