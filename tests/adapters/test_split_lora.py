"""LoRA for each layer of a group on its own: one LoRA of the group in files, at the strength that was trained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.adapters.base import AdapterEngine, Dropout
from sfumato.adapters.lora import LoRA
from sfumato.adapters.split_lora import SplitLoRA
from sfumato.errors import UserError
from sfumato.formats.groups import LayerGroup, find_layers, group_layers
from sfumato.formats.keymap import KeyMap, KeyRule

WIDTH = 6


def group_of(rows: list[int]) -> LayerGroup:
    """Layers of these numbers of rows behind one name, float64 and frozen."""
    layers = nn.ModuleDict({f"l{i}": nn.Linear(WIDTH, n) for i, n in enumerate(rows)}).double().requires_grad_(False)
    rule = KeyRule("fused", tuple(layers))
    (group,) = group_layers(find_layers(layers), ("{*}",), part="a", prefix="lora", adapter_map=KeyMap([rule]))
    return group


def make_random(group: LayerGroup, rank: int, alpha: float) -> SplitLoRA:
    adapter = SplitLoRA(group, rank=rank, alpha=alpha).double()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def export(adapter: SplitLoRA) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapter.export_tensors().items()}


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 3), st.floats(0.5, 8))
def test_the_file_is_a_plain_lora_of_the_same_strength(rows: list[int], rank: int, alpha: float) -> None:
    """Any program that knows LoRA of the fused layer gets what was trained, and we get the pairs back."""
    torch.manual_seed(sum(rows))
    group = group_of(rows)
    adapter = make_random(group, rank, alpha)
    file = export(adapter)
    assert file["lora_down.weight"].shape == (len(rows) * rank, WIDTH)
    assert file["lora_up.weight"].shape == (sum(rows), len(rows) * rank)
    scale = float(file["alpha"]) / len(file["lora_down.weight"])
    joint = scale * file["lora_up.weight"] @ file["lora_down.weight"]
    start = 0
    for i, n in enumerate(rows):
        own = alpha / rank * adapter[i].lora_up @ adapter[i].lora_down
        torch.testing.assert_close(joint[start : start + n], own, atol=1e-6, rtol=1e-6)  # alpha is float32 in files
        torch.testing.assert_close(adapter.delta(i), own, atol=1e-12, rtol=0)
        start += n
    again = SplitLoRA.from_tensors(group, file)
    assert (again.rank, again.alpha) == (rank, pytest.approx(alpha, rel=1e-6))
    assert all(torch.equal(a.float(), b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


def test_each_layer_learns_alone_and_adds_its_delta() -> None:
    torch.manual_seed(0)
    group = group_of([4, 3, 5])
    adapter = make_random(group, 2, 3.0)
    engine = AdapterEngine()
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    plain = [layer(x) for layer in group.layers]
    engine.attach([group], lambda _: adapter)
    for i, layer in enumerate(group.layers):
        expected = plain[i] + x @ adapter.delta(i).t()
        torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(adapter(x, i), expected - plain[i], atol=1e-12, rtol=0)
    group.layers[1](x).square().sum().backward()
    assert [p.grad is not None for p in adapter.parameters()] == [False, False, True, True, False, False]
    assert adapter[0].lora_down.shape == (2, WIDTH)


def test_each_matrix_is_drawn_for_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = SplitLoRA(group_of([4, 4]), rank=2, alpha=1, generator=generator)
    assert not torch.equal(adapter[0].lora_down, adapter[1].lora_down)
    assert not any(layer.lora_up.any() for layer in adapter)


def test_a_file_with_shared_ranks_is_refused() -> None:
    torch.manual_seed(0)
    group = group_of([4, 4])
    for rank in (2, 3):  # the second cannot be shared out at all
        plain = LoRA(group, rank=rank, alpha=1)
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        tensors = {name: tensor.detach() for name, tensor in plain.export_tensors().items()}
        with pytest.raises(UserError, match="2 layers") as error:
            SplitLoRA.from_tensors(group, tensors)
        assert error.value.code == "split-qkv-shared-ranks"


def test_dropout_and_norm_limit_reach_every_layer() -> None:
    torch.manual_seed(0)
    adapter = make_random(group_of([4, 3]), 2, 2.0)
    adapter.set_dropout(Dropout(neuron=0.5))
    assert adapter.dropout == adapter[1].dropout == Dropout(neuron=0.5)
    with torch.no_grad():
        adapter[0].lora_up.mul_(1e-3)
    before = adapter.delta(0).norm()
    largest, larger = adapter.limit_norm(0.1)
    assert bool(larger)
    torch.testing.assert_close(adapter.delta(0).norm(), before)
    torch.testing.assert_close(adapter.delta(1).norm(), torch.tensor(0.1, dtype=torch.float64))
    torch.testing.assert_close(largest.detach(), torch.tensor(0.1, dtype=torch.float64))
