"""Stable Diffusion 3's names at full size: against diffusers' converter and the reference trainer's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import nn

from families.built_part import BuiltPart
from keys import CLIP_G, CLIP_L, SD3, on_meta, round_trip, same, shapes_of, tagged
from lora_keys import Shapes, golden, shapes_in_file
from sfumato.adapters.lora import LoRA
from sfumato.families import _clip, _open_clip, _sd3_keys, _t5
from sfumato.families._sd3_text import PROJECTED_KEYS, make_spec
from sfumato.families.part import PartSpec

KEYS = {"medium": 491, "5-medium": 665, "5-large": 923}  # entries of the published transformers
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(SD3))
def test_transformer(kind: str) -> None:
    """Every key of the full model, rows at their real numbers, columns cut to one."""
    state = tagged(on_meta(lambda: _sd3_keys.build(SD3[kind])), columns=1)
    original = round_trip(_sd3_keys.key_map(SD3[kind]["num_layers"]), state)
    assert len(original) == KEYS[kind]
    theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    same(state, theirs)


@pytest.mark.parametrize("kind", sorted(SD3))
def test_module_is_that_of_diffusers(kind: str) -> None:
    """Its own first layer aside, whose table we leave without storage: same names, same shapes."""
    from diffusers import SD3Transformer2DModel

    small = SD3[kind] | {"num_layers": 2, "pos_embed_max_size": 8}
    small["dual_attention_layers"] = small["dual_attention_layers"][:1]
    ours: Any = on_meta(lambda: _sd3_keys.build(small))
    theirs: Any = on_meta(lambda: SD3Transformer2DModel.from_config(small))  # pyright: ignore
    assert shapes_of(ours) == shapes_of(theirs)
    assert {name: ours.config[name] for name in small} == {name: theirs.config[name] for name in small}


@pytest.mark.parametrize("kind", sorted(SD3))
def test_configuration_from_shapes(kind: str) -> None:
    found = _sd3_keys.config_from_shapes(shapes_of(on_meta(lambda: _sd3_keys.build(SD3[kind]))))
    assert found == {name: value for name, value in SD3[kind].items() if name != "sample_size"}
    assert _sd3_keys.get_version(found) == kind


def test_only_the_last_block_changes_the_order_of_its_context_norm() -> None:
    """Half a row each: scale before shift there, as in diffusers."""
    keys = _sd3_keys.key_map(3)
    tensor = torch.arange(4.0)
    shapes = {f"transformer_blocks.{i}.norm1_context.linear.bias": torch.Size([4]) for i in range(3)}
    found: dict[str, torch.Tensor] = {}
    for i in range(3):
        found |= dict(keys.split(f"joint_blocks.{i}.context_block.adaLN_modulation.1.bias", tensor, shapes))
    assert [each.tolist() for each in found.values()] == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 0, 1]]


@pytest.mark.parametrize("level", ["text_model.", ""])
def test_clip_files_with_a_projection(level: str) -> None:
    state = shapes_of(on_meta(lambda: _open_clip.build_projected(CLIP_L)))
    file = {level + key.removeprefix("text_model.") if key != "text_projection.weight" else key for key in state}
    names: set[str] = set()
    for key in file:
        ours = PROJECTED_KEYS.find_ours(key)
        names.update(ours[0] if ours else ())
    assert names == set(state)


# ---------------------------------------------------------------- adapters


def shapes(spec: PartSpec, build: Callable[[], nn.Module]) -> Shapes:
    adapters = [LoRA(group, rank=4, alpha=1) for group in BuiltPart(spec=spec, module=on_meta(build)).groups()]
    return shapes_in_file(adapters)


def transformer(kind: str) -> Shapes:
    return shapes(_sd3_keys.spec("", SD3[kind]["num_layers"]), lambda: _sd3_keys.build(SD3[kind]))


def clips(*, projected: bool) -> Shapes:
    build: dict[bool, Any] = {True: _open_clip.build_projected, False: _clip.build}
    clip_l = shapes(make_spec("clip_l", projected=projected), lambda: build[projected](CLIP_L))
    return clip_l | shapes(make_spec("clip_g", projected=True), lambda: _open_clip.build_projected(CLIP_G))


@pytest.mark.parametrize("projected", [True, False])
def test_sd3_medium(projected: bool) -> None:
    both = transformer("medium") | clips(projected=projected)
    assert both == golden("lora_sd3_medium")
    assert both | shapes(make_spec("t5"), lambda: _t5.build(T5_XXL)) == golden("lora_sd3_medium_t5")


def test_sd35_medium() -> None:
    assert transformer("5-medium") | clips(projected=True) == golden("lora_sd35_medium")


def test_sd35_large() -> None:
    assert transformer("5-large") == golden("lora_sd35_large")
