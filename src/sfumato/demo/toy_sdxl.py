"""The toy Stable Diffusion XL: one checkpoint in the original layout, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.demo import toy_sd
from sfumato.demo.toy import TOYS, WORDS, Layout, Toy
from sfumato.demo.weights import random_network
from sfumato.diffusion.objective import VariancePreserving
from sfumato.families import _clip, _open_clip, _tokenizers, _unet, _vae
from sfumato.families.sdxl import CLIP_G, CLIP_G_KEYS, CLIP_L, SIZES
from sfumato.formats.checkpoint import write_safetensors

WIDTH_G = 128  # of the second text encoder
POOLED = 96
TIME = 32  # channels of each size's embedding
UNET_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": toy_sd.WIDTH + WIDTH_G,
    "attention_head_dim": [1, 1, 2],  # heads of 64 channels
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME,
    "projection_class_embeddings_input_dim": POOLED + SIZES * TIME,
}
VAE_CONFIG = toy_sd.VAE_CONFIG | {"scaling_factor": 0.13025}


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    names = ("tokenizer", "tokenizer_2")
    words = max(_tokenizers.toy_tokenizer(folder / name, WORDS) for name in names)
    networks = make_networks(words, seed)
    tokenizers = {name: folder / name for name in names}
    if layout == "diffusers":
        write_folder(folder, networks)
        return {"pretrained_model_name_or_path": folder, **tokenizers}
    path = folder / "toy_sdxl.safetensors"
    write_safetensors(path, single_file(networks), {"format": "pt"})
    return {"pretrained_model_name_or_path": path, **tokenizers}


def make_networks(vocabulary: int, seed: int) -> dict[str, Any]:
    """The four networks; `vocabulary` is the size of both tokenizers."""
    clip_l = toy_sd.clip_config(vocabulary)
    clip_g = clip_l | {
        "hidden_size": WIDTH_G,
        "projection_dim": POOLED,
        "intermediate_size": 2 * WIDTH_G,
        "num_hidden_layers": 3,
        "num_attention_heads": WIDTH_G // 64,
        "hidden_act": "gelu",
    }
    return {
        "unet": random_network(_unet.build, UNET_CONFIG, seed=seed, purpose="sdxl unet"),
        "vae": random_network(_vae.build, VAE_CONFIG, seed=seed, purpose="sdxl vae"),
        "text_encoder": random_network(_clip.build, clip_l, seed=seed, purpose="sdxl clip l"),
        "text_encoder_2": random_network(_open_clip.build_projected, clip_g, seed=seed, purpose="sdxl clip g"),
    }


def single_file(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every entry of a checkpoint as it was published, what loading passes over included."""
    clip_l = _clip.key_map().to_original(networks["text_encoder"].state_dict())
    clip_l["text_model.embeddings.position_ids"] = torch.arange(_clip.LENGTH)[None]
    clip_g = CLIP_G_KEYS.to_original(networks["text_encoder_2"].state_dict())
    clip_g["logit_scale"] = torch.tensor(4.6)
    text = {CLIP_L + name: tensor for name, tensor in clip_l.items()}
    text |= {CLIP_G + name: tensor for name, tensor in clip_g.items()}
    return toy_sd.pictures(networks) | text


def write_folder(folder: Path, networks: Mapping[str, Any]) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes

    pipeline = library.StableDiffusionXLPipeline(
        **networks,
        tokenizer=_tokenizers.clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=_tokenizers.clip_tokenizer(folder / "tokenizer_2", pad_with_zero=True),
        scheduler=library.EulerDiscreteScheduler(**VariancePreserving().scheduler_options(), steps_offset=1),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)


TOYS.register("sdxl")(Toy(write=write, script="sdxl_train_network", options={"network_module": "networks.lora"}))
