"""Names and shapes in adapter files at full size, from models without storage, against the reference trainer's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from families.built_part import BuiltPart
from keys import CLIP_G, CLIP_H, CLIP_L, T5_XXL, UNETS, on_meta
from lora_keys import Shapes, golden, shapes_in_file
from sfumato.adapters.lora import LoRA
from sfumato.families import _chroma_keys, _clip, _flux_keys, _open_clip, _t5, _unet, sd, sdxl
from sfumato.families.part import PartSpec


def shapes(spec: PartSpec, build: Callable[[], nn.Module]) -> Shapes:
    """What a file of rank 4 would hold for one network."""
    adapters = [LoRA(group, rank=4, alpha=1) for group in BuiltPart(spec=spec, module=on_meta(build)).groups()]
    return shapes_in_file(adapters)


def sd_unet(variant: str) -> Shapes:
    return shapes(sd._unet_spec(_unet.key_map(UNETS[variant])), lambda: _unet.build(UNETS[variant]))


def transformer(*, guided: bool) -> Shapes:
    config = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": guided}
    return shapes(_flux_keys.spec(""), lambda: _flux_keys.build(config))


def test_sd15() -> None:
    clip = shapes(_clip.spec("clip", sd.CLIP_PREFIX, "lora_te"), lambda: _clip.build(CLIP_L))
    assert sd_unet("sd15") | clip == golden("lora_sd15")


@pytest.mark.parametrize("variant", ["sd21", "sd21_linearproj"])
def test_sd21(variant: str) -> None:
    key_map = _open_clip.key_map(projected=False)
    clip = shapes(_clip.spec("clip", sd.OPEN_CLIP_PREFIX, "lora_te", key_map), lambda: _clip.build(CLIP_H))
    assert sd_unet(variant) | clip == golden(f"lora_{variant}")


def test_sdxl() -> None:
    unet = shapes(sdxl._unet_spec(_unet.key_map(UNETS["sdxl"])), lambda: _unet.build(UNETS["sdxl"]))
    clip_l = shapes(sdxl.clip_l_spec(), lambda: _clip.build(CLIP_L))
    clip_g = shapes(sdxl.clip_g_spec(), lambda: _open_clip.build_projected(CLIP_G))
    assert unet | clip_l | clip_g == golden("lora_sdxl")


def test_flux_dev() -> None:
    unet = transformer(guided=True)
    clip_l = shapes(_clip.spec("clip_l", "", "lora_te1"), lambda: _clip.build(CLIP_L))
    t5 = shapes(_t5.spec(""), lambda: _t5.build(T5_XXL))
    assert unet == golden("lora_flux_unet_only")
    assert unet | clip_l == golden("lora_flux")
    assert unet | clip_l | t5 == golden("lora_flux_t5")


def test_flux_schnell() -> None:
    assert transformer(guided=False) == golden("lora_flux_schnell")


def test_chroma() -> None:
    unet = shapes(_chroma_keys.spec(""), lambda: _chroma_keys.build({}))
    t5 = shapes(_t5.spec(""), lambda: _t5.build(T5_XXL))
    assert unet == golden("lora_chroma")
    assert unet | t5 == golden("lora_chroma_t5")
