"""LoRA while it trains: the sum into the output, dropouts, the norm limit, recomputation and compilation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.adapters.base import Adapter, AdapterEngine, Dropout
from sfumato.adapters.lora import LoRA
from sfumato.formats.groups import LayerGroup, find_layers, group_layers
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map


def groups_of(module: nn.Module, adapter_map: KeyMap | None = None) -> list[LayerGroup]:
    return group_layers(
        find_layers(module),
        ("{*}",),
        part="denoiser",
        prefix="lora_unet",
        adapter_map=adapter_map or make_identity_map(),
    )


def attach_lora(module: nn.Module, *, rank: int = 3, alpha: float = 1.5, adapter_map: KeyMap | None = None):
    """An engine whose LoRAs have random matrices in the module's own dtype."""
    engine = AdapterEngine()
    dtype = next(module.parameters()).dtype
    engine.attach(groups_of(module, adapter_map), lambda group: LoRA(group, rank=rank, alpha=alpha).to(dtype))
    for parameter in engine.parameters():
        nn.init.normal_(parameter)
    return engine


def get_adapter(engine: AdapterEngine) -> LoRA:
    (adapter,) = engine
    assert isinstance(adapter, LoRA)
    return adapter


# ---------------------------------------------------------------- the sum into the output


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("strength", [0.7, torch.tensor([0.25, 2.0])])
def test_adding_into_the_output_is_adding(shape: tuple[int, ...], strength: float | Tensor) -> None:
    """Values and gradients, for any number of token dimensions; a strength for each row needs rows."""
    if isinstance(strength, Tensor) and len(shape) == 1:
        return
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    adapter = get_adapter(attach_lora(nn.Sequential(layer)))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = F.linear(x, layer.weight, layer.bias)
    ours = adapter.add_to(output, x, 0, strength)
    theirs = Adapter.add_to(adapter, output, x, 0, strength)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    seed, wanted = torch.randn_like(ours), [x, adapter.lora_down, adapter.lora_up]
    mine = torch.autograd.grad(ours, wanted, seed, retain_graph=True)
    for one, other in zip(mine, torch.autograd.grad(theirs, wanted, seed), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6)])
def test_one_node_for_a_frozen_layer_is_two_branches(shape: tuple[int, ...]) -> None:
    """Values and gradients, also of a layer that stands behind others and of a group's slices."""
    torch.manual_seed(0)
    fused = nn.ModuleDict({"q": nn.Linear(6, 4), "k": nn.Linear(6, 5, bias=False)}).double().requires_grad_(False)
    engine = attach_lora(fused, adapter_map=KeyMap([KeyRule("qk", ("q", "k"))]))
    adapter = get_adapter(engine)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, adapter.lora_down, adapter.lora_up]

    def results(exact: bool) -> list[Tensor]:
        seen = x.tanh()
        with engine.use_multiplier(0.0 if exact else 0.7):
            outputs = [fused["q"](seen), fused["k"](seen)]
        if exact:
            outputs = [y + 0.7 * F.linear(seen, adapter.delta(i)) for i, y in enumerate(outputs)]
        assert all("LowRank" in str(y.grad_fn) for y in outputs) != exact
        output = torch.cat(outputs, -1)
        return [output, *torch.autograd.grad((output**3).sum(), wanted)]

    for ours, theirs in zip(results(False), results(True), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_one_node_only_where_nothing_else_stands_behind_the_output() -> None:
    """A trained layer, another hook, another forward, another dtype: two branches, and every gradient arrives."""

    def behind(change: Callable[[nn.Linear], object], x: Tensor) -> str:
        layer = nn.Linear(6, 6).requires_grad_(False)
        attach_lora(nn.Sequential(layer))
        change(layer)
        return type(layer(x).grad_fn).__name__

    x = torch.randn(3, 6, requires_grad=True)
    assert behind(lambda layer: None, x) == "_LowRankBackward"
    assert behind(lambda layer: layer.requires_grad_(True), x) != "_LowRankBackward"
    assert behind(lambda layer: layer.register_forward_hook(lambda *_: None), x) != "_LowRankBackward"
    assert behind(lambda layer: setattr(layer, "forward", layer.forward), x) != "_LowRankBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert behind(lambda layer: None, x) != "_LowRankBackward"


def test_two_adapters_on_one_layer_both_learn() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4)).double().requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64)
    base = module(x)
    first, second = get_adapter(attach_lora(module)), get_adapter(attach_lora(module))
    output = module(x)
    torch.testing.assert_close(output, base + F.linear(x, first.delta(0) + second.delta(0)), atol=1e-12, rtol=0)
    output.sum().backward()
    assert first.lora_up.grad is not None
    assert second.lora_up.grad is not None


def test_without_gradients_the_input_stays_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(6, 6)).requires_grad_(False)
    attach_lora(module)
    x = torch.randn(2, 6)
    kept = x.clone()
    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_sum_is_rounded_once_in_bfloat16(frozen: bool) -> None:
    """bf16 outputs with float32 matrices: as close to the exact sum as bf16 can say."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32, bias=False).bfloat16().requires_grad_(not frozen)
    engine = AdapterEngine()
    engine.attach(groups_of(nn.Sequential(layer)), lambda group: LoRA(group, rank=4, alpha=4))
    adapter = get_adapter(engine)
    with torch.no_grad():
        adapter.lora_up.copy_(torch.randn(32, 4).bfloat16())
        adapter.lora_down.copy_(torch.randn(4, 32).bfloat16())
    x = torch.randn(16, 32).bfloat16()
    output = F.linear(x, layer.weight)
    low = F.linear(x, adapter.lora_down.bfloat16())
    exact = output.double() + low.double() @ adapter.lora_up.double().t()
    assert torch.equal(layer(x), exact.bfloat16())


def test_under_autocast() -> None:
    """A float32 input to a layer that autocast runs in bf16."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 3, 3, padding=1))
    attach_lora(module)
    with torch.autocast("cpu", torch.bfloat16):
        linear, image = module[0](torch.randn(2, 5, 8)), module[1](torch.randn(2, 3, 4, 4))
    assert linear.dtype == image.dtype == torch.bfloat16
    (linear.float().sum() + image.float().sum()).backward()


# ---------------------------------------------------------------- dropout


def project_down(adapter: LoRA, x: Tensor) -> Tensor:
    return adapter._project_down(x, adapter.lora_down, 0)


def test_neuron_dropout_is_torchs() -> None:
    adapter = get_adapter(attach_lora(nn.Sequential(nn.Linear(6, 4))))
    x = torch.randn(2, 5, 6)
    adapter.dropout = Dropout(neuron=0.4)
    torch.manual_seed(1)
    mine = project_down(adapter, x)
    torch.manual_seed(1)
    assert torch.equal(mine, F.dropout(F.linear(x, adapter.lora_down), 0.4))


@pytest.mark.parametrize(
    ("layer", "x", "inside"),
    [
        (nn.Linear(6, 4), torch.randn(40, 6), (0,)),
        (nn.Linear(6, 4), torch.randn(40, 5, 6), (0, 2)),
        (nn.Conv2d(6, 4, 3), torch.randn(40, 6, 5, 5), (0, 1)),
    ],
)
def test_rank_dropout(layer: nn.Module, x: Tensor, inside: tuple[int, ...]) -> None:
    """Whole ranks of a row vanish, the others grow by 1 / (1 - p), about p of them in all."""
    torch.manual_seed(0)
    adapter = get_adapter(attach_lora(nn.Sequential(layer), rank=8))
    plain = project_down(adapter, x)
    adapter.dropout = Dropout(rank=0.25)
    factor = project_down(adapter, x) / plain
    ranks = factor if x.ndim == 2 else factor.amax(dim=[d for d in range(factor.ndim) if d not in inside])
    assert torch.equal(ranks.isclose(torch.tensor(0.0)) | ranks.isclose(torch.tensor(4 / 3)), ranks == ranks)
    assert torch.allclose(factor, ranks if x.ndim == 2 else ranks.reshape(adapter_shape(factor, inside)))
    assert 0.65 < (ranks > 0).float().mean() < 0.85


def adapter_shape(factor: Tensor, inside: tuple[int, ...]) -> list[int]:
    return [size if d in inside else 1 for d, size in enumerate(factor.shape)]


def test_module_dropout() -> None:
    """All or nothing for the whole batch, without growth; the gradient is zero then, not missing."""
    module = nn.Sequential(nn.Linear(6, 4))
    adapter = get_adapter(attach_lora(module))
    x = torch.randn(2, 6)
    plain = module(x)
    base = F.linear(x, module[0].weight, module[0].bias)
    adapter.dropout = Dropout(module=0.5)
    torch.manual_seed(0)
    seen = [module(x) for _ in range(100)]
    kept = [torch.allclose(output, plain) for output in seen]
    assert all(torch.allclose(output, plain if k else base) for output, k in zip(seen, kept, strict=True))
    assert 30 < sum(kept) < 70
    seen[kept.index(False)].sum().backward()
    assert adapter.lora_up.grad is not None
    assert not adapter.lora_up.grad.any()


def test_no_dropout_in_evaluation() -> None:
    module = nn.Sequential(nn.Linear(6, 4))
    engine = attach_lora(module)
    plain = module(torch.ones(2, 6))
    get_adapter(engine).dropout = Dropout(neuron=0.5, rank=0.5, module=0.5)
    engine.eval()
    assert torch.equal(module(torch.ones(2, 6)), plain)


@pytest.mark.parametrize("chance", [0.0, 0.3])
def test_recomputation_sees_the_same_random_numbers(chance: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)).double().requires_grad_(False)
    engine = attach_lora(module)
    for adapter in engine:
        assert isinstance(adapter, LoRA)
        adapter.dropout = Dropout(neuron=chance, rank=chance, module=chance)
    x = torch.randn(7, 5, 6, dtype=torch.float64, requires_grad=True)

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(3)
        output = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
        return list(torch.autograd.grad((output**2).sum(), [x, *engine.parameters()]))

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.parametrize("multiplier", [1.0, torch.tensor([0.5, 1.0])])
def test_compiled_is_eager(multiplier: float | Tensor) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)).double().requires_grad_(False)
    engine = attach_lora(module)
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    def results() -> list[Tensor]:
        with engine.use_multiplier(multiplier):
            output = module(x)
        return [output, *torch.autograd.grad((output**2).sum(), list(engine.parameters()))]

    eager = results()
    module.compile(backend="aot_eager", fullgraph=True)
    for one, other in zip(results(), eager, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("size", [0.001, 1.0])
def test_the_norm_limit_is_that_of_sd_scripts(size: float) -> None:
    """ratio = clamp(norm, max) / max(norm, max / 2), of which both matrices take the root; the norm by the product."""
    torch.manual_seed(0)
    fused = nn.ModuleDict({"q": nn.Linear(6, 4), "k": nn.Linear(6, 5)}).double()
    modules = [fused, nn.Sequential(nn.Conv2d(3, 4, 3)).double()]
    maps = [KeyMap([KeyRule("qk", ("q", "k"))]), make_identity_map()]
    for module, adapter_map in zip(modules, maps, strict=True):
        adapter = get_adapter(attach_lora(module, adapter_map=adapter_map))
        with torch.no_grad():
            adapter.lora_up.mul_(size)
        before = [parameter.clone() for parameter in (adapter.lora_up, adapter.lora_down)]
        layers = range(len(adapter.group.layers))
        norm = torch.cat([adapter.delta(i).flatten() for i in layers]).norm().item()
        now, larger = adapter.limit_norm(0.5)
        ratio = min(norm, 0.5) / max(norm, 0.25)
        ratio = ratio if norm > 0.5 else 1.0
        for parameter, was in zip((adapter.lora_up, adapter.lora_down), before, strict=True):
            torch.testing.assert_close(parameter.detach(), was * math.sqrt(ratio), atol=1e-12, rtol=0)
        assert float(now) == pytest.approx(norm * ratio, rel=1e-9)
        assert bool(larger) == (norm > 0.5)


def test_a_change_of_zero_keeps_its_matrices() -> None:
    engine = AdapterEngine()
    engine.attach(groups_of(nn.Sequential(nn.Linear(3, 2))), lambda group: LoRA(group, rank=1, alpha=1))
    adapter = get_adapter(engine)
    with torch.no_grad():
        adapter.lora_down.fill_(1)
    found = engine.limit_norms(0.1)
    assert {name: float(value) for name, value in found.items()} == {
        "keys_scaled": 0, "avg_key_norm": 0, "max_key_norm": 0,
    }  # fmt: skip
    assert torch.equal(adapter.lora_down.detach(), torch.ones(1, 3))
