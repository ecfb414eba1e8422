"""Files that no family trains are called what they are, and none of those that a family trains is taken for one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from sfumato.config import ModelOptions
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families._other_models import name_other_model
from sfumato.families.base import find_family
from sfumato.families.source import open_source

# diffusers' class, arguments that make it small -> what it is
CLASSES: list[tuple[str, dict[str, Any], str]] = [
    ("ControlNetModel", {}, "a ControlNet"),
    ("FluxControlNetModel", {"num_layers": 1, "num_single_layers": 1}, "a ControlNet"),
    ("SD3ControlNetModel", {"num_layers": 1}, "a ControlNet"),
    ("T2IAdapter", {}, "a T2I-Adapter"),
    ("MotionAdapter", {}, "motion modules of AnimateDiff"),
    ("UNetSpatioTemporalConditionModel", {}, "Stable Video Diffusion"),
    ("StableCascadeUNet", {}, "Stable Cascade"),
    ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}, "FLUX.2"),
    ("QwenImageTransformer2DModel", {"num_layers": 1}, "Qwen-Image"),
    ("WanTransformer3DModel", {"num_layers": 1}, "Wan"),
    ("HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}, "HunyuanVideo or HunyuanImage"),
    ("PixArtTransformer2DModel", {"num_layers": 1}, "PixArt"),
    ("SanaTransformer2DModel", {"num_layers": 1}, "Sana"),
    ("AuraFlowTransformer2DModel", {"num_mmdit_layers": 1, "num_single_dit_layers": 1}, "AuraFlow"),
    ("CogVideoXTransformer3DModel", {"num_layers": 1}, "CogVideoX"),
    ("AutoencoderKLWan", {}, "an autoencoder of videos (Wan, Qwen-Image)"),
    ("AutoencoderTiny", {}, "a small autoencoder for previews (TAESD)"),
]
# diffusers' name of a kind of checkpoint -> what it is; one of its keys suffices
NAMED = {
    "xl_refiner": "the refiner of Stable Diffusion XL", "controlnet": "a ControlNet", "flux2": "FLUX.2",
    "stable_cascade_stage_c": "Stable Cascade", "hunyuan-video": "HunyuanVideo or HunyuanImage", "wan": "Wan",
    "hidream": "HiDream", "cosmos-1.0": "Cosmos", "mochi-1-preview": "Mochi", "ltx-video": "LTX-Video",
    "auraflow": "AuraFlow", "wan_vae": "an autoencoder of videos (Wan, Qwen-Image)",
    "z-image-turbo-controlnet": "a ControlNet",
}  # fmt: skip
FOREIGN = [
    (("model.1.sub.0.RDB1.conv1.0.weight", "model.0.weight"), "an upscaler (ESRGAN)"),
    (("emb_params",), "an embedding of textual inversion"),
    (("clip_g", "clip_l"), "an embedding of textual inversion"),
    (("redux_up.weight", "redux_down.weight", "redux_up.bias"), "FLUX.1 Redux"),
    (("double_blocks.0.img_attn.proj.weight.quant_state.bitsandbytes__nf4",), "a model in four bits (bitsandbytes)"),
    (("unet.down_blocks.0.attn.to_k_ip.weight",), "an IP-Adapter"),
    (("cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight"), "Z-Image"),
]


@pytest.mark.parametrize(("name", "arguments", "what"), CLASSES, ids=[row[0] for row in CLASSES])
def test_networks_of_diffusers(name: str, arguments: dict[str, Any], what: str) -> None:
    with init_empty_weights():
        network = getattr(diffusers, name)(**arguments)
    assert name_other_model(network.state_dict()) == what


@pytest.mark.parametrize("kind", NAMED)
def test_keys_by_which_diffusers_knows_a_checkpoint(kind: str) -> None:
    keys = CHECKPOINT_KEY_NAMES[kind]
    keys = [keys] if isinstance(keys, str) else list(keys)
    wanted = NAMED[kind]
    last_block = re.compile(r"resblocks\.9\.mlp\.c_proj\.bias")  # ours is of the first block
    keys = [last_block.sub("resblocks.0.attn.in_proj_weight", key) for key in keys]
    assert name_other_model(keys) == wanted


@pytest.mark.parametrize(("keys", "what"), FOREIGN)
def test_keys_of_other_programs(keys: Iterable[str], what: str) -> None:
    assert name_other_model(list(keys)) == what


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "chroma", "lumina"])
def test_what_is_trained_here_is_none_of_them(family: str, toy_shelf: ToyShelf) -> None:
    for path in toy_shelf.paths(family).values():
        if path.suffix == ".safetensors":
            keys = [*load_file(path), "bundle_emb.style.clip_l", "bundle_emb.style.clip_g", "bundle_emb.a.emb_params"]
            assert name_other_model(keys) == ""


def refuse(path: Path, family: str | None = None) -> UserError:
    register_families()
    with pytest.raises(UserError) as error:
        find_family(family, open_source(ModelOptions(pretrained_model_name_or_path=str(path))))
    return error.value


@pytest.mark.parametrize("family", [None, "flux"])
def test_a_control_network_with_the_blocks_of_a_known_model(
    family: str | None, toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    """It has all by which the model is recognized."""
    tensors = load_file(toy_shelf.paths("flux")["pretrained_model_name_or_path"])
    save_file(tensors | {"controlnet_blocks.0.weight": torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    error = refuse(tmp_path / "c.safetensors", family)
    assert error.code == "checkpoint-kind-untrainable"
    assert "a ControlNet" in error.what


def test_a_lone_transformer_in_diffusers_names(toy_shelf: ToyShelf) -> None:
    """Those of Stable Diffusion 3 and FLUX.1 share most names; each is recognized without its family's name."""
    register_families()
    for family in ("sd3", "flux", "chroma"):
        folder = toy_shelf.paths(family, "diffusers" if family != "chroma" else "original")
        path = folder["pretrained_model_name_or_path"]
        file = path / "transformer" / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
        assert find_family(None, open_source(ModelOptions(pretrained_model_name_or_path=str(file)))).name == family


@pytest.mark.parametrize(("family", "option", "kind"), [
    ("flux", "clip_l", "a CLIP text encoder"), ("flux", "t5xxl", "a T5 text encoder"), ("flux", "ae", "an autoencoder"),
])  # fmt: skip
def test_a_part_given_as_the_model(family: str, option: str, kind: str, toy_shelf: ToyShelf) -> None:
    error = refuse(toy_shelf.paths(family)[option])
    assert error.code == "model-family-unknown"
    assert kind in error.what


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "flux1-dev-Q8_0.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    error = refuse(tmp_path / "flux1-dev-Q8_0.gguf")
    assert error.code == "gguf-damaged"
    assert "GGUF" in error.what
