"""Kinds that form the whole change: in fused groups, their gradients, dropout and limits, and PEFT's files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from adapters.groups import complete, draw, make_group
from sfumato.adapters.base import Adapter, AdapterRequest, Dropout, apply_weight
from sfumato.adapters.kinds import list_kinds, restore_adapter
from sfumato.errors import InternalError
from sfumato.formats.groups import LayerGroup
from sfumato.formats.keymap import KeyMap, KeyRule
from sfumato.formats.peft_config import PeftConfig

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("loha", {}),
    ("loha", {"use_tucker": True}),
    ("full_difference", {}),
    ("glora", {}),
    ("ia3", {}),
    ("ia3", {"train_on_input": True}),
    ("diag_oft", {}),
    ("diag_oft", {"constraint": 0.01, "rescaled": True}),
    ("boft", {}),
    ("oft", {}),
    ("oft_v2", {}),
    ("oft_v2", {"coft": True, "coft_eps": 0.1, "block_share": True}),
    ("boft_v2", {}),
]
RANKS = {"boft": 10}  # which its rows can be divided into; else 2
each_kind = pytest.mark.parametrize(("kind", "options"), KINDS)
each_layer = pytest.mark.parametrize("conv", [False, True])


def make_layers(rows: list[int], *, conv: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, count, 3, padding=1) if conv else nn.Linear(6, count) for count in rows]
    return nn.ModuleDict({f"l{i}": layer for i, layer in enumerate(layers)}).double()


def make_fused(module: nn.Module) -> LayerGroup:
    return make_group(module, KeyMap([KeyRule("fused", tuple(dict(module.named_children())))]))


def make_adapter(kind: str, group: LayerGroup, **options: Any) -> Adapter:
    found = list_kinds()[kind]
    request = AdapterRequest(
        rank=RANKS.get(kind, 2), alpha=1.5, options=found.options_class(**options), generator=Generator()
    )
    adapter = found.create(group, request).double()
    draw(adapter)
    return adapter


def make_x(*, conv: bool) -> Tensor:
    return torch.randn(2, 6, 5, 5, dtype=torch.float64) if conv else torch.randn(2, 4, 6, dtype=torch.float64)


@each_kind
@each_layer
def test_a_fused_group_is_one_adapter_of_the_stacked_layer(kind: str, options: dict[str, Any], conv: bool) -> None:
    module, whole = make_layers([5, 3, 4], conv=conv), make_layers([12], conv=conv)
    group, plain = make_fused(module), make_group(whole)
    with torch.no_grad():
        plain.layers[0].weight.copy_(torch.cat([layer.weight for layer in group.layers]))
    adapter = make_adapter(kind, group, **options)
    kinds, tensors = complete({name: tensor.detach() for name, tensor in adapter.export_tensors().items()})
    stacked = restore_adapter(kinds, plain, tensors).double().delta(0)
    found = torch.cat([adapter.delta(i) for i in range(3)])
    torch.testing.assert_close(found, stacked, rtol=1e-6, atol=1e-7)
    assert found.abs().max() > 0.001


@each_kind
@each_layer
def test_output_and_gradients_are_those_of_the_change(kind: str, options: dict[str, Any], conv: bool) -> None:
    group, x = make_fused(make_layers([5, 3], conv=conv)), make_x(conv=conv).requires_grad_()
    adapter = make_adapter(kind, group, **options)
    inputs = [x, *adapter.parameters()]
    for i in range(2):
        expected = apply_weight(group.layers[i], x, adapter.delta(i), adapter.bias_delta(i))
        found = adapter(x, i)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        ours = torch.autograd.grad(found.square().sum(), inputs)
        for own, other in zip(ours, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


@each_kind
@each_layer
def test_dropout_drops_rows_or_all(kind: str, options: dict[str, Any], conv: bool) -> None:
    adapter, x = make_adapter(kind, make_group(make_layers([40], conv=conv)), **options), make_x(conv=conv)
    whole = adapter(x, 0)
    if "rank" in adapter.dropouts:
        adapter.set_dropout(Dropout(rank=0.5))
        dropped = adapter(x, 0)
        rows = (dropped != 0).movedim(1 if conv else -1, 0).flatten(1).any(1)
        assert 5 < rows.sum() < 35
        assert torch.equal(dropped.movedim(1 if conv else -1, 0)[rows], whole.movedim(1 if conv else -1, 0)[rows])
    adapter.set_dropout(Dropout(module=0.5))
    assert {bool(adapter(x, 0).any()) for _ in range(20)} == {True, False}


@each_kind
@each_layer
def test_the_norm_limit(kind: str, options: dict[str, Any], conv: bool) -> None:
    adapter = make_adapter(kind, make_fused(make_layers([5, 3], conv=conv)), **options)
    if not adapter.has_norm_limit:
        with pytest.raises(InternalError):
            adapter.limit_norm(0.25)
        return
    norm, larger = adapter.limit_norm(0.25)
    assert bool(larger)
    changes = torch.cat([adapter.delta(i).flatten() for i in range(2)])
    torch.testing.assert_close(changes.norm(), norm, check_dtype=False)
    assert float(norm) == pytest.approx(0.25)
    assert not adapter.limit_norm(0.5)[1]


@pytest.mark.parametrize("options", [
    {}, {"coft": True, "eps": 0.5}, {"block_share": True}, {"use_cayley_neumann": False},
])  # fmt: skip
def test_oftv2_equals_peft(options: dict[str, Any]) -> None:
    """Of linear layers; PEFT's convolutions change overlapping inputs, so that R = 1 is not the model itself."""
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"], **options)
    exact = PeftConfig(path=Path("file"), is_exact_rotation=options.get("use_cayley_neumann") is False)
    limit = {"coft": True, "coft_eps": options["eps"]} if "coft" in options else {}
    assert_equals_peft(peft, config, exact, count=1, **limit)


class BlockDiagonals:
    """What PEFT computes in CUDA code, without which it takes one stage alone."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


@pytest.mark.parametrize("stages", [1, 2])
def test_boft_equals_peft(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", BlockDiagonals)
    config = peft.BOFTConfig(boft_block_size=2, target_modules=["0", "1"], boft_n_butterfly_factor=stages)
    assert_equals_peft(peft, config, PeftConfig(path=Path("file")))


@pytest.mark.parametrize("options", [{}, {"use_effective_conv2d": True}])
def test_loha_equals_peft(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(r=2, alpha=3, target_modules=["0", "1"], **options)
    assert_equals_peft(peft, config, PeftConfig(path=Path("file"), alpha=3.0, rank=2.0))


def assert_equals_peft(peft: Any, config: Any, ours: PeftConfig, *, count: int = 2, **options: Any) -> None:
    """PEFT's layers with drawn values give what adapters from PEFT's tensors give; options: the kind's own."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 8), nn.Conv2d(8, 12, 3, padding=1)).double()
    theirs = nn.Sequential(nn.Linear(12, 8), nn.Conv2d(8, 12, 3, padding=1)).double()
    theirs.load_state_dict(plain.state_dict())
    wrapped = peft.get_peft_model(theirs, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    state = peft.get_peft_model_state_dict(wrapped)
    inputs = (torch.randn(4, 12, dtype=torch.float64), torch.randn(2, 8, 5, 5, dtype=torch.float64))
    for i, x in enumerate(inputs[:count]):
        start = f"base_model.model.{i}."
        tensors = {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
        kinds, found = complete(tensors, ours)
        adapter = restore_adapter(kinds, make_group(nn.ModuleList([plain[i]])), found).double()
        adapter.configure(type(adapter).options_class(**options))
        output = adapter.add_to(plain[i](x), x, 0, 1.0)
        expected = wrapped.base_model.model[i](x)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        assert (expected - plain[i](x)).abs().max() > 0.01
