"""PiSSA and the trained scalar: what they start from, and what their files say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from adapters.groups import complete, draw, make_group
from sfumato.adapters.base import Adapter, AdapterRequest
from sfumato.adapters.kinds import choose_kinds, create_adapter, list_related, restore_adapter
from sfumato.errors import UserError
from sfumato.formats.groups import LayerGroup


def make_layer(conv: bool) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 9, 3, padding=1) if conv else nn.Linear(12, 9)


def make(kind: str, group: LayerGroup, **arguments: Any) -> Adapter:
    options = {
        name: each.options_class(**{n: v for n, v in arguments.items() if n in each.options_class.model_fields})
        for name, each in list_related(kind).items()
    }
    request = AdapterRequest(rank=3, alpha=1.5, options=options[kind], generator=Generator().manual_seed(1))
    return create_adapter(choose_kinds(kind, options, group), group, request, options)


def save(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in adapter.export_tensors().items()}


@pytest.mark.parametrize("conv", [False, True])
def test_pissa_starts_from_the_largest_singular_parts_and_changes_nothing(conv: bool) -> None:
    group = make_group(nn.Sequential(make_layer(conv)))
    adapter = make("lora", group, pissa=True)
    assert not adapter.delta(0).any()
    u, s, v = torch.linalg.svd(group.layers[0].weight.detach().flatten(1), full_matrices=False)
    largest = u[:, :3] * s[:3] @ v[:3]
    start = dict(adapter.named_buffers())
    found = 0.5 * start["start_up"] @ start["start_down"]
    torch.testing.assert_close(found, largest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("conv", [False, True])
def test_a_file_of_pissa_is_a_lora_of_its_change(conv: bool) -> None:
    group = make_group(nn.Sequential(make_layer(conv)))
    adapter = make("lora", group, pissa=True)
    draw(adapter)
    kinds, tensors = complete(save(adapter))
    lora = restore_adapter(kinds, group, tensors)
    torch.testing.assert_close(lora.delta(0), adapter.delta(0))
    x = torch.randn(2, 6, 5, 5) if conv else torch.randn(2, 12)
    torch.testing.assert_close(adapter(x, 0), lora(x, 0), rtol=1e-5, atol=1e-5)
    again = type(adapter).from_tensors(group, tensors)
    torch.testing.assert_close(again.delta(0), adapter.delta(0))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("conv", [False, True])
def test_the_scalar_is_multiplied_into_a_matrix_of_the_file(kind: str, conv: bool) -> None:
    group = make_group(nn.Sequential(make_layer(conv)))
    adapter = make(kind, group, use_scalar=True)
    assert not adapter.delta(0).any()
    assert all(parameter.any() for name, parameter in adapter.named_parameters() if name != "scalar")
    adapter.delta(0).sum().backward()
    assert [
        name for name, parameter in adapter.named_parameters() if parameter.grad is not None and parameter.grad.any()
    ]
    nn.init.constant_(dict(adapter.named_parameters())["scalar"], -0.3)
    kinds, tensors = complete(save(adapter))
    torch.testing.assert_close(restore_adapter(kinds, group, tensors).delta(0), adapter.delta(0))


def test_wrappers_train_what_the_kind_within_trains() -> None:
    group = make_group(nn.Sequential(make_layer(False)))
    adapter = make("lora_fa", group, use_scalar=True, dora_wd=True)
    assert [name for name, _ in adapter.trainable()] == ["dora_scale", "scalar", "lora_up"]


def test_two_kinds_at_once_are_refused() -> None:
    given = {"pissa": True, "split_qkv": True}
    options = {
        name: each.options_class(**{n: v for n, v in given.items() if n in each.options_class.model_fields})
        for name, each in list_related("lora").items()
    }
    with pytest.raises(UserError) as error:
        choose_kinds("lora", options, None)
    assert error.value.code == "adapter-kinds-together"
