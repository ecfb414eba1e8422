"""The layers behind the names of an adapter file, without a model: at full size, against diffusers' own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
from torch import nn

from keys import CLIP_G, CLIP_H, CLIP_L, GEMMA2, LUMINA, SD3, T5_XXL, UNETS, on_meta, shapes_of
from lora_keys import golden
from sfumato.families import (
    _chroma_keys,
    _clip,
    _flux_keys,
    _gemma2,
    _lumina_keys,
    _open_clip,
    _sd3_keys,
    _t5,
    _unet,
    register_families,
)
from sfumato.families.adapter_names import guess_layers
from sfumato.families.base import FAMILIES
from sfumato.formats.adapter_layers import LayerTable
from sfumato.formats.groups import LayerGroup, make_meta_layers

Builds = Mapping[str, Callable[[], nn.Module]]
FLUX: dict[str, Any] = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
CLIPS: Builds = {
    "clip_l": lambda: _clip.build(CLIP_L),
    "clip_g": lambda: _clip.build(CLIP_G),
    "t5": lambda: _t5.build(T5_XXL),
}
GOLDENS: dict[str, tuple[str, Builds]] = {  # golden -> family, networks by our names
    "lora_flux_t5": ("flux", {**CLIPS, "denoiser": lambda: _flux_keys.build(FLUX)}),
    "lora_flux_dims": ("flux", {**CLIPS, "denoiser": lambda: _flux_keys.build(FLUX)}),
    "lora_flux_train_blocks_single": ("flux", {**CLIPS, "denoiser": lambda: _flux_keys.build(FLUX)}),
    "lora_chroma_t5": ("chroma", {**CLIPS, "denoiser": lambda: _chroma_keys.build({})}),
    "lora_sd3_medium_t5": ("sd3", {**CLIPS, "denoiser": lambda: _sd3_keys.build(SD3["medium"])}),
    "lora_sd35_medium_dims": ("sd3", {**CLIPS, "denoiser": lambda: _sd3_keys.build(SD3["5-medium"])}),
    "lora_sd35_large": ("sd3", {"denoiser": lambda: _sd3_keys.build(SD3["5-large"])}),
    "lora_lumina": (
        "lumina", {"denoiser": lambda: _lumina_keys.build(LUMINA), "gemma2": lambda: _gemma2.build(GEMMA2)}
    ),
    "lora_lumina_dims": ("lumina", {"denoiser": lambda: _lumina_keys.build(LUMINA)}),
    "lora_sd15_conv": (
        "sd", {"denoiser": lambda: _unet.build(UNETS["sd15"]), "clip": lambda: _clip.build(CLIP_L)}
    ),
    "lora_sd21_conv": (
        "sd", {"denoiser": lambda: _unet.build(UNETS["sd21"]), "clip": lambda: _clip.build(CLIP_H)}
    ),
    "lora_sdxl_conv": (
        "sdxl",
        {
            "denoiser": lambda: _unet.build(UNETS["sdxl"]), "clip_l": CLIPS["clip_l"],
            "clip_g": lambda: _open_clip.build_projected(CLIP_G),
        },
    ),
}  # fmt: skip


@cache
def named(variant: str) -> dict[str, tuple[int, ...]]:
    """Name in the golden -> shape of the weight that it changes."""
    keys = golden(variant)
    names = dict.fromkeys(key.partition(".")[0] for key in keys)
    return {name: (keys[f"{name}.lora_up.weight"][0], *keys[f"{name}.lora_down.weight"][1:]) for name in names}


def found(family: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LayerGroup]:
    """Name in the file -> the layers behind it, in the file's layout."""
    register_families()
    table = LayerTable()
    for spec in FAMILIES.get(family).adapter_specs(shapes).values():
        table.add_part(spec.adapter_prefixes, spec.make_views(make_meta_layers(guess_layers(spec, shapes))))
    groups: dict[str, LayerGroup] = {}
    for name in shapes:
        for view in table.find(name):
            assert name not in groups
            groups[name] = view
    return groups


FAST = {"lora_flux_dims", "lora_sd35_medium_dims", "lora_sdxl_conv"}


@pytest.mark.parametrize(
    "variant", [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in sorted(GOLDENS)]
)
def test_every_name_leads_to_layers_of_diffusers_with_just_these_shapes(variant: str) -> None:
    family, builds = GOLDENS[variant]
    groups = found(family, named(variant))
    assert set(groups) == set(named(variant))
    real = {part: shapes_of(on_meta(build)) for part, build in builds.items()}
    paths: list[tuple[str, str]] = []
    for group in groups.values():
        paths += [(group.part, path) for path in group.paths]
    assert len(set(paths)) == len(paths)
    for group in groups.values():
        for path, layer in zip(group.paths, group.layers, strict=True):
            assert tuple(layer.weight.shape) == real[group.part][f"{path}.weight"], (group.name, path)


@pytest.mark.parametrize("kind", sorted(SD3))
def test_the_last_block_is_recognized_by_its_rows(kind: str) -> None:
    """Only there the context norm's halves are the other way round."""
    blocks = SD3[kind]["num_layers"]
    variant = {"medium": "lora_sd3_medium", "5-medium": "lora_sd35_medium", "5-large": "lora_sd35_large"}[kind]
    groups = found("sd3", named(variant))
    swapped = [name for name, group in groups.items() if len(group.rows[0]) == 2]
    assert swapped == [f"lora_unet_joint_blocks_{blocks - 1}_context_block_adaLN_modulation_1"]


def test_stacked_rows_are_those_of_the_models() -> None:
    flux, lumina = (found(family, named(f"lora_{family}")) for family in ("flux", "lumina"))
    linear1 = flux["lora_unet_single_blocks_0_linear1"]
    assert [layer.weight.shape[0] for layer in linear1.layers] == [3072, 3072, 3072, 12288]
    qkv = lumina["lora_unet_layers_3_attention_qkv"]
    assert [layer.weight.shape[0] for layer in qkv.layers] == [2304, 768, 768]


def test_layers_of_another_name_or_model_are_left_out() -> None:
    shapes = {
        "lora_unet_double_blocks_0_img_attn_qkv": (96, 32), "lora_unet_double_blocks_0_img_attn_norm": (32, 32),
        "lora_unet_joint_blocks_0_x_block_attn_qkv": (96, 32), "lora_unet_img_in": (32, 64), "lora_unet": (1, 1),
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (32, 32), "lora_te1_text_model_encoder": (1, 1),
    }  # fmt: skip
    assert set(found("flux", shapes)) == {
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_img_in",
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj",
    }  # fmt: skip


def test_names_of_a_further_layout_lead_to_the_same_layers() -> None:
    """Other programs write Stable Diffusion XL's files in diffusers' names."""
    theirs = {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_out_0": (64, 64)}
    (group,) = found("sdxl", theirs).values()
    assert group.paths == ("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0",)
    assert not found("sdxl", {"lora_unet_down_blocks_0_attentions_0_proj_in": (64, 64)})  # no such layer in any model


def test_a_shape_that_no_stack_has() -> None:
    assert not found("flux", {"lora_unet_single_blocks_0_linear1": (50, 32)})
    assert not found("sd3", {"lora_unet_joint_blocks_0_x_block_attn_qkv": (50, 32)})
