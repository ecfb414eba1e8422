"""Key maps: both directions, stacked rows, operations, and no key lost in silence."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import UserError
from sfumato.formats.keymap import KeyMap, Rule, identity

MAP = KeyMap(
    [
        Rule("blocks.{n}.qkv", ("layers.{n}.q", "layers.{n}.k", "layers.{n}.v")),
        Rule("blocks.{n}.norm.scale", ("layers.{n}.norm.weight",)),
        Rule("tail.{n}.{*}", ("end.{n}.inner.{*}",)),
        Rule("final.1", ("norm_out.linear",), "swap"),
        Rule("attn.q", ("to_q",), "squeeze"),
        Rule("projection", ("proj",), "transpose"),
    ],
    drop=("position_ids", "model_ema.{*}"),
)


def example() -> dict[str, torch.Tensor]:
    """Ours; the stacked layers have unequal numbers of rows."""
    shapes = {"layers.3.q.weight": (2, 5), "layers.3.k.weight": (3, 5), "layers.3.v.weight": (4, 5)}
    shapes |= {"layers.3.q.bias": (2,), "layers.3.k.bias": (3,), "layers.3.v.bias": (4,)}
    shapes |= {"layers.12.norm.weight": (7,), "end.0.inner.a.b.weight": (2, 2), "norm_out.linear.weight": (6, 3)}
    shapes |= {"to_q.weight": (4, 4), "proj": (2, 3)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_round_trip_is_bit_exact() -> None:
    ours = example()
    original = MAP.to_original(ours)
    assert set(original) == {
        "blocks.3.qkv.weight", "blocks.3.qkv.bias", "blocks.12.norm.scale", "tail.0.a.b.weight",
        "final.1.weight", "attn.q.weight", "projection",
    }  # fmt: skip
    back = MAP.to_ours(original, {name: tensor.shape for name, tensor in ours.items()})
    assert set(back) == set(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_operations() -> None:
    ours = example()
    original = MAP.to_original(ours)
    q, k, v = (ours[f"layers.3.{x}.weight"] for x in "qkv")
    assert torch.equal(original["blocks.3.qkv.weight"], torch.cat([q, k, v]))
    swapped = ours["norm_out.linear.weight"]
    assert torch.equal(original["final.1.weight"], torch.cat([swapped[3:], swapped[:3]]))
    assert original["attn.q.weight"].shape == (4, 4, 1, 1)
    assert torch.equal(original["projection"], ours["proj"].T)


def test_locate_a_module_and_a_parameter() -> None:
    place = MAP.locate("layers.3.k")
    assert (place.original, place.index) == ("blocks.3.qkv", 1)
    assert place.siblings == ("layers.3.q", "layers.3.k", "layers.3.v")
    assert MAP.locate("layers.3.k.bias").original == "blocks.3.qkv.bias"


def test_unknown_and_incomplete_keys_are_errors() -> None:
    with pytest.raises(UserError, match="nowhere"):
        MAP.locate("nowhere.weight")
    with pytest.raises(UserError, match="surprise"):
        MAP.to_ours({"surprise.weight": torch.zeros(1)}, {})
    lacking = {name: tensor for name, tensor in example().items() if name != "layers.3.k.weight"}
    with pytest.raises(UserError, match=r"layers\.3\.k\.weight"):
        MAP.to_original(lacking)


def test_dropped_keys_are_left_out_on_purpose_only() -> None:
    assert MAP.drops("model_ema.decay")
    assert MAP.to_ours({"position_ids": torch.zeros(3), "model_ema.decay": torch.zeros(1)}, {}) == {}


def test_wrong_number_of_rows_is_an_error() -> None:
    shapes = {name: tensor.shape for name, tensor in example().items()}
    with pytest.raises(UserError, match="8 rows where 2 \\+ 3 \\+ 4"):
        MAP.to_ours({"blocks.3.qkv.weight": torch.zeros(8, 5)}, shapes)


def test_identity_keeps_names_behind_a_prefix() -> None:
    assert identity("text_model.").locate("encoder.layers.0.mlp.fc1").original == "text_model.encoder.layers.0.mlp.fc1"
