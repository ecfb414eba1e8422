"""Layers whose weights are in fewer bits: torch's own forward and backward, of the weight that is meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.adapters.base import AdapterEngine, AdapterRequest, merge_adapter
from sfumato.adapters.kinds import register_adapters
from sfumato.adapters.lora import LoRA
from sfumato.formats.groups import LayerGroup
from sfumato.quantization.nf4 import NormalFloat4
from sfumato.quantization.scaled_blocks import PlainFloat8, ScaledBlocks
from sfumato.quantization.weight import QuantizedWeight, quantize
from sfumato.quantization.weight_format import WeightFormat

FORMATS: dict[str, WeightFormat] = {
    "float8": PlainFloat8(),
    "float8 blocks": ScaledBlocks(dtype=torch.float8_e4m3fn, block=64),
    "int8 rotated": ScaledBlocks(dtype=torch.int8, rotation=256),
    "nf4": NormalFloat4(),
}
Layer = nn.Linear | nn.Conv2d


def make_layer(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Layer, Tensor]:
    """A layer and an input of it."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 48) if kind == "linear" else nn.Conv2d(8, 6, 3, padding=1)
    x = torch.randn(2, 5, 96) if kind == "linear" else torch.randn(2, 8, 5, 5)
    return layer.requires_grad_(False).to(dtype), x.to(dtype)


def quantize_layer(layer: Layer, form: WeightFormat) -> QuantizedWeight:
    layer.weight = nn.Parameter(quantize(layer.weight.detach(), form), requires_grad=False)
    assert isinstance(layer.weight, QuantizedWeight)
    return layer.weight


def output_and_gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    return y.detach(), gradient


def plain_forward(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    return (
        F.linear(x, weight, layer.bias) if isinstance(layer, nn.Linear) else F.conv2d(x, weight, layer.bias, padding=1)
    )


@contextmanager
def list_kept(kept: list[Tensor]) -> Iterator[None]:
    """What autograd keeps for backward."""

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_backward_are_those_of_the_weight_that_is_meant(name: str, kind: str) -> None:
    layer, x = make_layer(kind)
    weight = quantize_layer(layer, FORMATS[name])
    expected = output_and_gradient(lambda x: plain_forward(layer, weight.decode(), x), x)
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        found = output_and_gradient(run, x)
        assert all(map(torch.equal, found, expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), expected[0])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_backward_keeps_nothing_but_what_is_stored(kind: str) -> None:
    layer, x = make_layer(kind)
    weight, kept = quantize_layer(layer, FORMATS["float8 blocks"]), list[Tensor]()
    with list_kept(kept):
        layer(x.requires_grad_())
    own = {tensor.data_ptr() for tensor in weight.stored.values()}
    weights = [tensor for tensor in kept if isinstance(tensor, QuantizedWeight)]
    assert weights
    assert all({tensor.data_ptr() for tensor in each.stored.values()} == own for each in weights)
    others = [tensor for tensor in kept if not isinstance(tensor, QuantizedWeight)]
    assert all(tensor.numel() <= x.numel() for tensor in others)


def test_the_layer_is_a_module_like_any_other() -> None:
    """It moves, is saved and loaded, and keeps its format."""
    layer, x = make_layer("linear")
    weight = quantize_layer(layer, FORMATS["nf4"])
    expected = layer(x)
    state = layer.state_dict()
    other, _ = make_layer("linear")
    other.load_state_dict(state, assign=True)
    nn.Module.to(other, torch.device("cpu"))
    assert isinstance(other.weight, QuantizedWeight)
    assert other.weight.stored["pairs"].data_ptr() == weight.stored["pairs"].data_ptr()
    assert torch.equal(other(x), expected)
    copied = torch.empty_like(other.weight).copy_(other.weight)
    assert isinstance(copied, QuantizedWeight)
    assert torch.equal(copied.decode(), weight.decode())
    nn.Module.to(layer, "meta")
    assert layer.weight.is_meta


@pytest.mark.full
@pytest.mark.parametrize("name", FORMATS)
def test_compiled_it_gives_the_same(name: str) -> None:
    layer, x = make_layer("linear")
    quantize_layer(layer, FORMATS[name])
    expected = output_and_gradient(layer, x)
    found = output_and_gradient(torch.compile(layer, backend="aot_eager"), x)
    assert all(map(torch.equal, found, expected))


def test_an_adapter_in_the_same_node() -> None:
    """LoRA adds in place on a frozen layer; backward decodes the weight again."""
    register_adapters()
    layer, x = make_layer("linear", torch.float32)
    weight = quantize_layer(layer, FORMATS["float8 blocks"])
    group = LayerGroup("a", "denoiser", ("a",), (layer,), (((0, 48),),))
    generator = torch.Generator().manual_seed(0)
    lora = LoRA(group, rank=4, alpha=2, generator=generator)
    nn.init.normal_(lora.lora_up, generator=generator)
    engine = AdapterEngine()
    engine.attach([group], lambda _: lora)
    found = output_and_gradient(layer, x)
    changed = weight.decode() + lora.delta(0).detach()
    expected = output_and_gradient(lambda x: F.linear(x, changed, layer.bias), x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    kept = list[Tensor]()
    with list_kept(kept):
        layer(x.requires_grad_())
    assert not any(tensor.shape == (48, 96) and not isinstance(tensor, QuantizedWeight) for tensor in kept)


def test_merging_rounds_the_sum_to_the_format() -> None:
    layer, _ = make_layer("linear")
    weight = quantize_layer(layer, FORMATS["float8 blocks"])
    before = weight.decode(torch.float32)
    group = LayerGroup("a", "denoiser", ("a",), (layer,), (((0, 48),),))
    lora = LoRA.create(group, AdapterRequest(rank=4, alpha=4, options=LoRA.options_class()))
    with torch.no_grad():
        lora.lora_up.normal_()
        lora.lora_down.normal_()
    merge_adapter(lora, 0.5)
    expected = quantize(before + 0.5 * lora.delta(0).detach(), FORMATS["float8 blocks"])
    assert torch.equal(weight.decode(torch.float32), expected.decode(torch.float32))
