"""LoRA: against the closed form, PEFT's layer, and the fused layer in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.adapters.base import AdapterEngine, merge_adapter
from sfumato.adapters.lora import LoRA
from sfumato.errors import InternalError
from sfumato.formats.groups import find_layers, group_layers
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map


class Fused(nn.Module):
    """Three linear layers that the original file stores as one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def groups_of(module: nn.Module, adapter_map: KeyMap | None = None) -> list:
    return group_layers(
        find_layers(module),
        ("{*}",),
        part="denoiser",
        prefix="lora_unet",
        adapter_map=adapter_map or make_identity_map(),
    )


def randomize(adapter: LoRA) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)


def test_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(7, 3, 3, padding=1, stride=2)).double()
    theirs = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(7, 3, 3, padding=1, stride=2)).double()
    theirs.load_state_dict(plain.state_dict())
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"])
    wrapped = peft.inject_adapter_in_model(config, theirs)
    engine = AdapterEngine()
    engine.attach(groups_of(plain), lambda group: LoRA(group, rank=2, alpha=3.0).double())
    for adapter, layer in zip(engine, [wrapped[0], wrapped[1]], strict=True):
        randomize(adapter)
        layer.lora_A["default"].weight.data.copy_(adapter.lora_down)
        layer.lora_B["default"].weight.data.copy_(adapter.lora_up)
    x = torch.randn(4, 5, dtype=torch.float64)
    image = torch.randn(2, 7, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(plain[0](x), wrapped[0](x), atol=1e-12, rtol=0)
    torch.testing.assert_close(plain[1](image), wrapped[1](image), atol=1e-12, rtol=0)


def test_a_group_equals_lora_on_the_fused_layer() -> None:
    torch.manual_seed(0)
    module = Fused().double()
    fused_map = KeyMap([KeyRule("qkv", ("q", "k", "v"))])
    engine = AdapterEngine()
    engine.attach(groups_of(module, fused_map), lambda group: LoRA(group, rank=3, alpha=1.5).double())
    (adapter,) = engine
    randomize(adapter)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    ours = module(x)
    weight = torch.cat([module.q.weight, module.k.weight, module.v.weight])
    bias = torch.cat([module.q.bias, module.k.bias, module.v.bias])
    expected = x @ (weight + 0.5 * adapter.lora_up @ adapter.lora_down).T + bias
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    seed = torch.randn_like(ours)
    inputs = [x, adapter.lora_down, adapter.lora_up]
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("multiplier", [0.7, torch.tensor([0.0, 0.5, 1.0])])
def test_delta_and_forward_agree_and_merge_keeps_the_output(multiplier: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)).double()
    engine = AdapterEngine()
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    base = module(x)
    engine.attach(groups_of(module), lambda group: LoRA(group, rank=2, alpha=1.0).double())
    for adapter in engine:
        randomize(adapter)
    with engine.use_multiplier(0.0):
        assert torch.equal(module(x), base)
    with engine.use_multiplier(multiplier):
        attached = module(x)
    if isinstance(multiplier, torch.Tensor):
        for i, strength in enumerate(multiplier.tolist()):
            with engine.use_multiplier(strength):
                torch.testing.assert_close(module(x)[i], attached[i], atol=1e-12, rtol=0)
        return
    for adapter in engine:
        merge_adapter(adapter, multiplier)
    with engine.use_multiplier(0.0):
        torch.testing.assert_close(module(x), attached, atol=1e-12, rtol=0)


def test_rows_per_sample_are_sample_major() -> None:
    """Two rows per sample, as with long captions in chunks: both take their sample's strength."""
    module = nn.Sequential(nn.Linear(3, 2))
    engine = AdapterEngine()
    engine.attach(groups_of(module), lambda group: LoRA(group, rank=1, alpha=1.0))
    randomize(next(iter(engine)))
    x = torch.randn(4, 3)
    with engine.use_multiplier(torch.tensor([1.0, 0.0])):
        mixed = module(x)
    with engine.use_multiplier(0.0):
        assert torch.equal(mixed[2:], module(x)[2:])
    assert torch.allclose(mixed[:2], module(x)[:2])


def test_file_entries_round_trip() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    (group,) = groups_of(module)
    adapter = LoRA(group, rank=2, alpha=0.5)
    randomize(adapter)
    again = LoRA.from_tensors(group, adapter.export_tensors())
    assert (again.rank, again.alpha) == (2, 0.5)
    assert torch.equal(again.delta(0), adapter.delta(0))


def test_a_target_that_matches_half_a_group_is_an_error() -> None:
    module = Fused()
    with pytest.raises(InternalError, match="lora_unet_qkv"):
        group_layers(
            find_layers(module),
            ("q", "k"),
            part="denoiser",
            prefix="lora_unet",
            adapter_map=KeyMap([KeyRule("qkv", ("q", "k", "v"))]),
        )


def test_report_names_what_did_not_train() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    engine = AdapterEngine()
    engine.attach(groups_of(module), lambda group: LoRA(group, rank=1, alpha=1.0))
    module["used"](torch.randn(1, 2)).sum().backward()
    assert engine.report() == ["1 adapted layer never ran: lora_unet_idle"]
