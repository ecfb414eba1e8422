"""Lumina-Image 2.0 at full size, without its weights: key maps, configurations, names in adapter files."""

from __future__ import annotations

from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families.built_part import BuiltPart
from keys import GEMMA2, LUMINA, on_meta, round_trip, same, shapes_of, tagged, to_ours
from lora_keys import Shapes, golden, shapes_in_file
from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.lora import LoRA
from sfumato.config import NetworkOptions
from sfumato.demo import toy_lumina
from sfumato.errors import UserError
from sfumato.families import _gemma2, _lumina_keys
from sfumato.methods.adapter_args import read_args
from sfumato.methods.adapter_ranks import AdapterRanks
from sfumato.tools.export_lora import export_lora

DIMS = {"attn_dim": 2, "mlp_dim": 6, "mod_dim": 8, "refiner_dim": 10, "embedder_dims": [1, 2, 3]}


@cache
def transformer() -> BuiltPart:
    return BuiltPart(spec=_lumina_keys.spec(""), module=on_meta(lambda: _lumina_keys.build(LUMINA)))


@cache
def gemma() -> BuiltPart:
    return BuiltPart(spec=_gemma2.spec(""), module=on_meta(lambda: _gemma2.build(GEMMA2)))


def test_every_key_both_ways() -> None:
    """Rows at their real numbers, columns cut to one; a norm that nothing uses is left out."""
    state = tagged(transformer().module, columns=1)
    original = round_trip(_lumina_keys.LUMINA_KEYS, state)
    assert len(original) == 26 * 13 + 2 * 13 + 2 * 11 + 13
    published = original | {"norm_final.weight": torch.zeros(2304)}
    same(state, single_file_utils.convert_lumina2_to_diffusers(dict(published)))
    same(state, to_ours(_lumina_keys.LUMINA_KEYS, published, {name: tensor.shape for name, tensor in state.items()}))


def test_configuration_from_shapes() -> None:
    original = _lumina_keys.LUMINA_KEYS.to_original(transformer().module.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    assert _lumina_keys.config_from_shapes(shapes) == LUMINA
    assert _lumina_keys.split_lumina_rows("qkv.weight", shapes["layers.0.attention.qkv.weight"]) == [2304, 768, 768]


@pytest.mark.parametrize("multiplier", [None, 0.7, 1.5])
def test_a_feed_forward_layer_of_any_width(multiplier: float | None) -> None:
    config = toy_lumina.make_lumina_config() | {"multiple_of": 8, "ffn_dim_multiplier": multiplier}
    module = on_meta(lambda: _lumina_keys.build(config))
    original = _lumina_keys.LUMINA_KEYS.to_original(module.state_dict())
    found = _lumina_keys.config_from_shapes({name: tuple(tensor.shape) for name, tensor in original.items()})
    assert shapes_of(on_meta(lambda: _lumina_keys.build(found))) == shapes_of(module)


def test_unequal_refiners_are_refused() -> None:
    original = _lumina_keys.LUMINA_KEYS.to_original(transformer().module.state_dict())
    shapes = {name: tuple(t.shape) for name, t in original.items() if not name.startswith("noise_refiner.1")}
    with pytest.raises(UserError) as error:
        _lumina_keys.config_from_shapes(shapes)
    assert error.value.code == "refiner-counts-differ"


def test_gemma_keys_and_configuration() -> None:
    """With and without the level of the causal language model."""
    state = tagged(gemma().module)
    original = round_trip(_gemma2.GEMMA2_FILE_KEYS, state)
    assert len(original) == 26 * 11 + 2
    assert all(name.startswith("model.") for name in original)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    more = {"lm_head.weight": torch.zeros(1), "spiece_model": torch.zeros(1)}
    same(state, to_ours(_gemma2.GEMMA2_FILE_KEYS, original | more, shapes))
    same(state, to_ours(_gemma2.GEMMA2_FILE_KEYS, state, shapes))
    found = shapes_of(gemma().module)
    assert _gemma2.config_from_shapes(found) == GEMMA2
    assert _gemma2.is_gemma2(found)
    assert not _gemma2.is_gemma2({**found, "layers.0.self_attn.q_norm.weight": (256,)})  # Gemma 3


def shapes(parts: list[BuiltPart], arguments: dict[str, Any]) -> Shapes:
    """What a file of rank 4 would hold."""
    specs = {part.spec.name: part.spec for part in parts}
    ranks = AdapterRanks(
        network=NetworkOptions(network_dim=4), args=read_args(arguments, specs.values()), specs=specs
    )  # fmt: skip
    groups = list(chain.from_iterable(part.groups(every=True) for part in parts))
    ranks.check(groups)
    adapters = [LoRA(group, rank=found[0], alpha=found[1]) for group in groups if (found := ranks.find_rank(group))]
    return shapes_in_file(adapters)


def test_files_are_those_of_the_field() -> None:
    assert shapes([transformer(), gemma()], {}) == golden("lora_lumina")


def of_rank(rank: int, name: str, found: Shapes) -> Shapes:
    return {
        f"{name}.lora_down.weight": (rank, *found[f"{name}.lora_down.weight"][1:]),
        f"{name}.lora_up.weight": (found[f"{name}.lora_up.weight"][0], rank),
    }


def test_ranks_by_kind() -> None:
    """As in sd-scripts, except for two of its defects.

    There mlp_dim looks for "mlp" in names, which the feed-forward layers do not have: they keep the plain rank, or
    refiner_dim. But the time embedding has it, so that mlp_dim takes the place of embedder_dims' second number.
    """
    wanted = golden("lora_lumina_dims")
    for name in {key.partition(".")[0] for key in wanted}:
        if "feed_forward" in name:
            wanted |= of_rank(6, name, wanted)
        if "t_embedder_mlp" in name:
            wanted |= of_rank(2, name, wanted)
    assert shapes([transformer()], DIMS) == wanted


def test_the_first_kind_that_fits_decides_in_whatever_order_they_are_given() -> None:
    turned = dict(reversed(DIMS.items()))
    assert shapes([transformer()], turned) == shapes([transformer()], DIMS)
    found = shapes([transformer()], {"refiner_dim": 10, "attn_dim": 2})
    assert found["lora_unet_noise_refiner_1_attention_out.lora_up.weight"] == (2304, 2)
    assert found["lora_unet_noise_refiner_1_feed_forward_w1.lora_up.weight"] == (9216, 10)
    assert found["lora_unet_context_refiner_0_feed_forward_w2.lora_up.weight"] == (2304, 10)
    assert found["lora_unet_layers_0_feed_forward_w2.lora_up.weight"] == (2304, 4)


def test_a_rank_of_zero_is_none() -> None:
    found = shapes([transformer()], {"attn_dim": 0, "mod_dim": 0, "embedder_dims": [0, 2, 0]})
    names = {key.partition(".")[0] for key in found}
    assert not any("attention" in name or "adaLN" in name or "x_embedder" in name for name in names)
    assert {name for name in names if "embedder" in name} == {
        "lora_unet_t_embedder_mlp_0", "lora_unet_t_embedder_mlp_2",
    }  # fmt: skip


def test_blocks_by_number() -> None:
    """The golden has every block, since sd-scripts never reads the argument; here it chooses among the main ones."""
    everything = golden("lora_lumina_blocks")
    others = tuple(f"lora_unet_layers_{i}_" for i in range(4, 26))
    wanted = {key: shape for key, shape in everything.items() if not key.startswith(others)}
    assert shapes([transformer()], {"train_block_indices": "0-3"}) == wanted
    with pytest.raises(UserError, match="25") as error:
        shapes([transformer()], {"train_block_indices": "26"})
    assert error.value.code == "block-index-too-high"


@pytest.mark.parametrize(
    ("blocks", "starts"),
    [
        ("all", ("layers", "final_layer", "noise_refiner", "context_refiner")),
        ("transformer", ("layers", "final_layer")),
        ("refiners", ("noise_refiner", "context_refiner")),
        ("noise_refiner", ("noise_refiner",)),
        ("context_refiner", ("context_refiner",)),
    ],
)
def test_blocks_by_name(blocks: str, starts: tuple[str, ...]) -> None:
    wanted = golden("lora_lumina_blocks")
    begin = tuple(f"lora_unet_{start}_" for start in starts)
    assert shapes([transformer()], {"train_blocks": blocks}) == {
        key: shape for key, shape in wanted.items() if key.startswith(begin)
    }


def test_the_names_of_the_export_are_those_of_diffusers_converter(tmp_path: Path) -> None:
    """A file of original names, as other programs write them, becomes the same; it only knows blocks at real width."""
    module = on_meta(lambda: _lumina_keys.build(LUMINA | {"num_layers": 1, "num_refiner_layers": 1}))
    part = BuiltPart(spec=_lumina_keys.spec(""), module=module)
    engine = AdapterEngine()
    groups = [group for group in part.groups() if "final_layer" not in group.name]
    engine.attach(groups, lambda group: LoRA(group, rank=2, alpha=2.0))
    for parameter in engine.to_empty(device="cpu").parameters():
        nn.init.normal_(parameter)
    original: dict[str, Tensor] = {}
    for adapter in engine:
        assert isinstance(adapter, LoRA)
        name = "diffusion_model." + _lumina_keys.LUMINA_KEYS.locate(adapter.group.paths[0]).original
        assert adapter.group.name == "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")
        original[f"{name}.lora_A.weight"] = adapter.lora_down.detach()
        original[f"{name}.lora_B.weight"] = adapter.lora_up.detach()
    save_file(engine.export_tensors(), tmp_path / "lora.safetensors")
    save_file(original, tmp_path / "original.safetensors")
    theirs = lora_conversion_utils._convert_non_diffusers_lumina2_lora_to_diffusers(dict(original))
    for name in ("lora", "original"):
        export_lora(tmp_path / f"{name}.safetensors", tmp_path / "theirs.safetensors", program="diffusers")
        same(load_file(tmp_path / "theirs.safetensors"), theirs)
