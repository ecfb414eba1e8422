"""The toy Stable Diffusion XL: one checkpoint in the original layout, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.demo import toy_sd
from sfumato.demo.toy import TOY_WORDS, TOYS, Layout, Toy
from sfumato.demo.weights import make_random_network
from sfumato.diffusion.objective import VariancePreserving
from sfumato.families import _clip, _open_clip, _tokenizers, _unet, _vae
from sfumato.families.sdxl import CLIP_G_KEYS, CLIP_G_PREFIX, CLIP_L_PREFIX, NUM_SIZES
from sfumato.formats.checkpoint_writer import write_safetensors

CLIP_G_WIDTH = 128  # of the second text encoder
CLIP_G_PROJECTION = 96
_SIZE_CHANNELS = 32  # channels of each size's embedding
SDXL_UNET_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": toy_sd.CLIP_WIDTH + CLIP_G_WIDTH,
    "attention_head_dim": [1, 1, 2],  # heads of 64 channels
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": _SIZE_CHANNELS,
    "projection_class_embeddings_input_dim": CLIP_G_PROJECTION + NUM_SIZES * _SIZE_CHANNELS,
}
SDXL_VAE_CONFIG = toy_sd.SD_VAE_CONFIG | {"scaling_factor": 0.13025}


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    names = ("tokenizer", "tokenizer_2")
    words = max(_tokenizers.write_toy_clip_tokenizer(folder / name, TOY_WORDS) for name in names)
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
    clip_l = toy_sd.make_clip_config(vocabulary)
    clip_g = clip_l | {
        "hidden_size": CLIP_G_WIDTH,
        "projection_dim": CLIP_G_PROJECTION,
        "intermediate_size": 2 * CLIP_G_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": CLIP_G_WIDTH // 64,
        "hidden_act": "gelu",
    }
    return {
        "unet": make_random_network(_unet.build, SDXL_UNET_CONFIG, seed=seed, purpose="sdxl unet"),
        "vae": make_random_network(_vae.build, SDXL_VAE_CONFIG, seed=seed, purpose="sdxl vae"),
        "text_encoder": make_random_network(_clip.build, clip_l, seed=seed, purpose="sdxl clip l"),
        "text_encoder_2": make_random_network(_open_clip.build_projected, clip_g, seed=seed, purpose="sdxl clip g"),
    }


def single_file(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the published keys, with those that loading ignores."""
    clip_l = _clip.key_map().to_original(networks["text_encoder"].state_dict())
    clip_l["text_model.embeddings.position_ids"] = torch.arange(_clip.CLIP_LENGTH)[None]
    clip_g = CLIP_G_KEYS.to_original(networks["text_encoder_2"].state_dict())
    clip_g["logit_scale"] = torch.tensor(4.6)
    text = {CLIP_L_PREFIX + name: tensor for name, tensor in clip_l.items()}
    text |= {CLIP_G_PREFIX + name: tensor for name, tensor in clip_g.items()}
    return toy_sd.to_unet_and_vae_keys(networks) | text


def write_folder(folder: Path, networks: Mapping[str, Any]) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes

    pipeline = library.StableDiffusionXLPipeline(
        **networks,
        tokenizer=_tokenizers.load_clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=_tokenizers.load_clip_tokenizer(folder / "tokenizer_2", pad_with_zero=True),
        scheduler=library.EulerDiscreteScheduler(**VariancePreserving().scheduler_options(), steps_offset=1),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)


TOYS.register("sdxl")(Toy(write=write, script="sdxl_train_network", options={"network_module": "networks.lora"}))
