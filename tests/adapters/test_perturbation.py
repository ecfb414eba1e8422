"""GGPO: the strength of each row's noise against its formula, and where the noise is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adapters.groups import make_group
from sfumato.adapters.base import Adapter, AdapterEngine, AdapterRequest
from sfumato.adapters.kinds import list_kinds
from sfumato.adapters.perturbation import Perturbation
from sfumato.config.base import Options
from sfumato.formats.groups import LayerGroup
from sfumato.formats.keymap import KeyMap, KeyRule

SIGMA, BETA = 0.3, 0.2
FUSED = KeyMap(rules=(KeyRule("qkv", ("q", "k")),))


class Fused(nn.Module):
    """Two layers behind one name."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x)], dim=-1)


def attach(
    module: nn.Module, kind: str = "lora", adapter_map: KeyMap | None = None
) -> tuple[AdapterEngine, Adapter, LayerGroup]:
    group, engine = make_group(module.requires_grad_(False), adapter_map), AdapterEngine()
    request = AdapterRequest(rank=2, alpha=1.0, options=Options(), generator=Generator().manual_seed(1))
    adapter = list_kinds()[kind].create(group, request)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    adapter.perturbation = Perturbation(group, sigma=SIGMA, beta=BETA)
    engine.attach([group], lambda _: adapter)
    return engine, adapter, group


def find_strengths(adapter: Adapter, group: LayerGroup) -> Tensor:
    """The formula over whole matrices; the gradient of up @ down by forward-mode differentiation of the delta."""
    names = [name for name, _ in adapter.named_parameters()]
    values = tuple(parameter.detach() for parameter in adapter.parameters())
    grads = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in adapter.parameters())

    def stack(*given: Tensor) -> Tensor:
        state = dict(zip(names, given, strict=True))
        deltas = [
            torch.func.functional_call(Delta(adapter, i), {f"adapter.{name}": value for name, value in state.items()})
            for i in range(len(group.layers))
        ]
        return group.stack_rows([delta.flatten(1) for delta in deltas])

    change, gradient = torch.func.jvp(stack, values, grads)
    weight = group.stack_rows([layer.weight.flatten(1) for layer in group.layers])
    lengths = (weight.square().sum(1) + change.square().sum(1)).sqrt()
    return (SIGMA * lengths + BETA * gradient.square().sum(1)) / math.sqrt(len(weight))


class Delta(nn.Module):
    def __init__(self, adapter: Adapter, i: int) -> None:
        super().__init__()
        self.adapter, self.i = adapter, i

    def forward(self) -> Tensor:
        return self.adapter.delta(self.i)


CASES: dict[str, tuple[Callable[[], nn.Module], str, KeyMap | None, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4)), "lora", None, (5, 6)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(6, 4, 3, padding=1)), "lora", None, (2, 6, 5, 5)),
    "fused": (Fused, "lora", FUSED, (5, 6)),
    "split": (Fused, "split_lora", FUSED, (5, 6)),
    "frozen down": (lambda: nn.Sequential(nn.Linear(6, 4)), "lora_fa", None, (5, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_strengths_are_the_formula(case: str) -> None:
    torch.manual_seed(0)
    make, kind, adapter_map, shape = CASES[case]
    module = make()
    engine, adapter, group = attach(module, kind, adapter_map)
    adapter.requires_grad_(False)
    for _, parameter in adapter.trainable():
        parameter.requires_grad_()
    module(torch.randn(shape)).square().sum().backward()
    curves = engine.update_perturbations()
    assert adapter.perturbation is not None
    torch.testing.assert_close(adapter.perturbation.strengths, find_strengths(adapter, group), rtol=1e-4, atol=1e-6)
    assert curves.keys() == {"avg_grad_norm", "avg_combined_norm"}


def test_the_noise_is_in_the_forward_of_training_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    engine, adapter, _ = attach(nn.Sequential(layer))
    x = torch.randn(5, 6)
    engine.eval()
    plain = layer(x)
    engine.train()
    torch.manual_seed(3)
    perturbed = layer(x)
    torch.manual_seed(3)
    assert adapter.perturbation is not None
    noise = torch.randn(4, 6) * adapter.perturbation.strengths[:, None]
    torch.testing.assert_close(perturbed, plain + F.linear(x, noise))
    with engine.use_multiplier(0.0):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    engine, adapter, _ = attach(nn.Sequential(layer))
    assert adapter.perturbation is not None
    before = adapter.perturbation.strengths.clone()
    (layer(torch.randn(5, 6)) * torch.inf).sum().backward()
    engine.update_perturbations()
    assert torch.equal(adapter.perturbation.strengths, before)


def test_the_gradient_does_not_flow_through_the_noise() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    engine, _, _ = attach(nn.Sequential(layer))
    grads: list[Tensor] = []
    for training in (True, False):
        engine.train(training)
        x = torch.ones(5, 6, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
