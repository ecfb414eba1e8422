"""Key maps: both directions, stacked rows, operations, and no key lost in silence."""

from __future__ import annotations

import pytest
import torch

from keys import to_ours
from sfumato.errors import InternalError, UserError
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map

MAP = KeyMap(
    [
        KeyRule("blocks.{n}.qkv", ("layers.{n}.q", "layers.{n}.k", "layers.{n}.v")),
        KeyRule("blocks.{n}.norm.scale", ("layers.{n}.norm.weight",)),
        KeyRule("tail.{n}.{*}", ("end.{n}.inner.{*}",)),
        KeyRule("final.1", ("norm_out.linear",), "swap"),
        KeyRule("attn.q", ("to_q",), "squeeze"),
        KeyRule("projection", ("proj",), "transpose"),
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
    back = to_ours(MAP, original, {name: tensor.shape for name, tensor in ours.items()})
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
    location = MAP.locate("layers.3.k")
    assert (location.original, location.index) == ("blocks.3.qkv", 1)
    assert location.siblings == ("layers.3.q", "layers.3.k", "layers.3.v")
    assert MAP.locate("layers.3.k.bias").original == "blocks.3.qkv.bias"


def test_unknown_and_incomplete_keys_are_errors() -> None:
    assert MAP.find_original("nowhere.weight") is None
    assert MAP.find_ours("surprise.weight") is None
    with pytest.raises(InternalError, match="nowhere"):
        MAP.locate("nowhere.weight")
    with pytest.raises(InternalError, match="surprise"):
        to_ours(MAP, {"surprise.weight": torch.zeros(1)}, {})
    lacking = {name: tensor for name, tensor in example().items() if name != "layers.3.k.weight"}
    with pytest.raises(InternalError, match=r"layers\.3\.k\.weight"):
        MAP.to_original(lacking)


def test_shapes_of_a_file_in_our_names() -> None:
    assert MAP.rename_shapes({"to_q.weight": (4, 4), "nowhere.weight": (1,)}) == {"attn.q.weight": (4, 4)}


def test_dropped_keys_have_no_counterpart() -> None:
    assert MAP.is_dropped("model_ema.decay")
    assert to_ours(MAP, {"position_ids": torch.zeros(3), "model_ema.decay": torch.zeros(1)}, {}) == {}


def test_wrong_number_of_rows_is_an_error() -> None:
    shapes = {name: tensor.shape for name, tensor in example().items()}
    with pytest.raises(UserError, match=r"8.*2 \+ 3 \+ 4") as error:
        to_ours(MAP, {"blocks.3.qkv.weight": torch.zeros(8, 5)}, shapes)
    assert error.value.code == "stacked-rows-mismatch"


def test_identity_keeps_names_behind_a_prefix() -> None:
    assert (
        make_identity_map("text_model.").locate("encoder.layers.0.mlp.fc1").original
        == "text_model.encoder.layers.0.mlp.fc1"
    )
