"""The names under which ComfyUI looks for LoRA of a model, by its rules, at full size: no layer of ours is missed.

Its rules, as facts: a layer of the diffusion model is `lora_unet_` and its key in the checkpoint, with _ for dots; one
of CLIP-L `lora_te1_text_model_encoder_layers_N_` and its place in the layer, of CLIP-G beside it `lora_te2_...`; one of
T5 beside one CLIP or both `lora_te3_` and its place; one of a lone language model `lora_te_` and its place. Matrices
are `.lora_up.weight` and `.lora_down.weight`; `.alpha` / rank times their product is added.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import nn

from families.built_part import BuiltPart
from keys import CLIP_G, CLIP_L, GEMMA2, LUMINA, SD3, T5_XXL, on_meta
from sfumato.adapters.lora import LoRA
from sfumato.adapters.split_lora import SplitLoRA
from sfumato.families import (
    _chroma_keys,
    _clip,
    _flux_keys,
    _gemma2,
    _lumina_keys,
    _open_clip,
    _sd3_keys,
    _sd3_text,
    _t5,
)
from sfumato.families.part import PartSpec

CLIP_PLACES = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")))
Shapes = dict[str, tuple[int, ...]]


def of_diffusion_model(module: nn.Module, spec: PartSpec) -> Shapes:
    """Name -> shape of the weight that it changes."""
    state = spec.key_map.to_original(module.state_dict())
    weights = {key.removesuffix(".weight"): tensor for key, tensor in state.items() if key.endswith(".weight")}
    return {f"lora_unet_{key.replace('.', '_')}": tuple(tensor.shape) for key, tensor in weights.items()}


def of_clip(module: nn.Module, spec: PartSpec) -> Shapes:
    number = {"clip_l": 1, "clip_g": 2}[spec.name]
    state = {key.removeprefix("text_model."): tensor for key, tensor in module.state_dict().items()}
    names = {f"encoder.layers.{n}.{place}.weight": (n, place) for n, place in product(range(32), CLIP_PLACES)}
    return {
        f"lora_te{number}_text_model_encoder_layers_{names[key][0]}_{names[key][1].replace('.', '_')}": tuple(
            tensor.shape
        )
        for key, tensor in state.items()
        if key in names
    }


def of_t5(module: nn.Module, spec: PartSpec) -> Shapes:
    weights = {key.removesuffix(".weight"): tensor for key, tensor in module.state_dict().items()}
    return {f"lora_te3_{key.replace('.', '_')}": tuple(tensor.shape) for key, tensor in weights.items()}


def of_language_model(module: nn.Module, spec: PartSpec) -> Shapes:
    weights = {key.removesuffix(".weight"): tensor for key, tensor in module.state_dict().items()}
    return {f"lora_te_{key.replace('.', '_')}": tuple(tensor.shape) for key, tensor in weights.items()}


def sd3(kind: str) -> tuple[PartSpec, Callable[[], nn.Module]]:
    return _sd3_keys.spec("", SD3[kind]["num_layers"]), lambda: _sd3_keys.build(SD3[kind])


CASES: dict[str, tuple[PartSpec, Callable[[], nn.Module], Callable[[nn.Module, PartSpec], Shapes], int]] = {
    "flux": (_flux_keys.spec(""), lambda: _flux_keys.build({"guidance_embeds": True}), of_diffusion_model, 304),
    "chroma": (_chroma_keys.spec(""), lambda: _chroma_keys.build({}), of_diffusion_model, 228),
    "clip_l": (_clip.spec("clip_l", "", "lora_te1"), lambda: _clip.build(CLIP_L), of_clip, 72),
    "t5": (_t5.spec(""), lambda: _t5.build(T5_XXL), of_t5, 168),
    "sd3 medium": (*sd3("medium"), of_diffusion_model, 237),
    "sd3.5 medium": (*sd3("5-medium"), of_diffusion_model, 263),
    "sd3.5 large": (*sd3("5-large"), of_diffusion_model, 377),
    "sd3 clip_l": (
        _sd3_text.make_spec("clip_l", projected=True), lambda: _open_clip.build_projected(CLIP_L), of_clip, 72
    ),
    "sd3 clip_g": (
        _sd3_text.make_spec("clip_g", projected=True), lambda: _open_clip.build_projected(CLIP_G), of_clip, 192
    ),
    "sd3 t5": (_sd3_text.make_spec("t5"), lambda: _t5.build(T5_XXL), of_t5, 168),
    "lumina": (_lumina_keys.spec(""), lambda: _lumina_keys.build(LUMINA), of_diffusion_model, 180),
    "gemma2": (_gemma2.spec(""), lambda: _gemma2.build(GEMMA2), of_language_model, 182),
}  # fmt: skip


@pytest.mark.parametrize("kind", [LoRA, SplitLoRA])
@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_found_and_fits(name: str, kind: type[LoRA | SplitLoRA]) -> None:
    spec, build, rules, count = CASES[name]
    module = on_meta(build)
    known = rules(module, spec)
    groups = BuiltPart(spec=spec, module=module).groups()
    assert len(groups) == count
    for group in groups:
        adapter = (kind if len(group.layers) > 1 else LoRA)(group, rank=4, alpha=2)
        file = adapter.export_tensors()
        rows, columns = known[group.name]
        assert set(file) == {"lora_up.weight", "lora_down.weight", "alpha"}
        up, down = file["lora_up.weight"], file["lora_down.weight"]
        assert (up.shape[0], *down.shape) == (rows, up.shape[1], columns)
        assert float(file["alpha"]) / len(down) == 0.5
        assert file["alpha"].dtype == torch.float32
