"""LoRA-FA: a LoRA whose down matrix stays, and which keeps no input."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from adapters.groups import make_group
from sfumato.adapters.base import Adapter, AdapterEngine, AdapterRequest
from sfumato.adapters.kinds import list_kinds
from sfumato.config.base import Options


def attach(kind: str, layer: nn.Module) -> tuple[AdapterEngine, Adapter]:
    group, engine = make_group(nn.Sequential(layer)), AdapterEngine()
    request = AdapterRequest(rank=3, alpha=1.5, options=Options(), generator=Generator().manual_seed(1))
    adapter = list_kinds()[kind].create(group, request)
    adapter.requires_grad_(False)
    for _, parameter in adapter.trainable():
        parameter.requires_grad_()
    engine.attach([group], lambda _: adapter)
    return engine, adapter


def run(kind: str, conv: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None], bool]:
    """Output, gradients of the input and of the parameters, and whether the input was kept for them."""
    torch.manual_seed(0)
    layer = (nn.Conv2d(6, 4, 3, padding=1) if conv else nn.Linear(6, 4)).requires_grad_(False)
    x = torch.randn(2, 6, 5, 5) if conv else torch.randn(2, 7, 6)
    x.requires_grad_()
    engine, adapter = attach(kind, layer)
    nn.init.normal_(dict(adapter.named_parameters())["lora_up"], generator=Generator().manual_seed(2))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    output.square().sum().backward()
    assert x.grad is not None
    engine.detach()
    gradients = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    return output, x.grad, adapter.delta(0), gradients, x.data_ptr() in kept


@pytest.mark.parametrize("conv", [False, True])
def test_it_is_lora_without_the_gradient_of_its_down_matrix(conv: bool) -> None:
    output, grad_x, delta, gradients, keeps_input = run("lora_fa", conv)
    of_lora = run("lora", conv)
    for own, other in zip((output, grad_x, delta), of_lora[:3], strict=True):
        assert torch.equal(own, other)
    up, other_up = gradients["lora_up"], of_lora[3]["lora_up"]
    assert up is not None
    assert other_up is not None
    assert torch.equal(up, other_up)
    assert gradients["lora_down"] is None
    assert of_lora[3]["lora_down"] is not None
    assert of_lora[4]
    assert keeps_input == conv  # torch's convolution keeps its input even where its weight is frozen
