"""The toy Stable Diffusion 1: one checkpoint in the original layout, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.demo.toy import TOYS, WORDS, Layout, Toy
from sfumato.demo.weights import random_network
from sfumato.diffusion.objective import VariancePreserving
from sfumato.families import _clip, _tokenizers, _unet, _vae
from sfumato.families.sd import CLIP, UNET
from sfumato.formats.checkpoint import write_safetensors

WIDTH = 64  # of the text encoder
UNET_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 64, 64],
    "layers_per_block": 1,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,  # diffusers' name for the number of heads
}
VAE_CONFIG = {
    "block_out_channels": [32, 32, 64, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    words = _tokenizers.toy_tokenizer(folder / "tokenizer", WORDS)
    networks = make_networks(words, seed)
    if layout == "diffusers":
        write_folder(folder, networks)
        return {"pretrained_model_name_or_path": folder, "tokenizer": folder / "tokenizer"}
    path = folder / "toy_sd.safetensors"
    write_safetensors(path, single_file(networks), {"format": "pt"})
    return {"pretrained_model_name_or_path": path, "tokenizer": folder / "tokenizer"}


def make_networks(vocabulary: int, seed: int) -> dict[str, Any]:
    """The three networks; `vocabulary` is the tokenizer's size."""
    return {
        "unet": random_network(_unet.build, UNET_CONFIG, seed=seed, purpose="sd unet"),
        "vae": random_network(_vae.build, VAE_CONFIG, seed=seed, purpose="sd vae"),
        "text_encoder": random_network(_clip.build, clip_config(vocabulary), seed=seed, purpose="sd clip"),
    }


def clip_config(vocabulary: int) -> dict[str, Any]:
    """A CLIP text tower of two layers; the tokenizer's begin and end tokens are its last two."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "projection_dim": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "max_position_embeddings": _clip.LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def single_file(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every entry of a checkpoint as the first trainers of the field saved it, leftovers of their training included."""
    unet = _unet.key_map(UNET_CONFIG).to_original(networks["unet"].state_dict())
    vae = _vae.key_map(len(VAE_CONFIG["block_out_channels"])).to_original(networks["vae"].state_dict())
    clip = _clip.key_map().to_original(networks["text_encoder"].state_dict())
    clip["text_model.embeddings.position_ids"] = torch.arange(_clip.LENGTH)[None]
    return {
        **{UNET + name: tensor for name, tensor in unet.items()},
        **{_vae.PREFIX + name: tensor for name, tensor in vae.items()},
        **{CLIP + name: tensor for name, tensor in clip.items()},
        **leftovers(),
    }


def leftovers() -> dict[str, Tensor]:
    """The schedule's buffers and the average's counters, which loading must pass over."""
    kept = VariancePreserving().alphas_cumprod
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    betas = 1 - kept / before
    posterior = betas * (1 - before) / (1 - kept)
    tables = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - kept).log(),
        "sqrt_recip_alphas_cumprod": kept.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": posterior,
        "posterior_log_variance_clipped": posterior.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (betas.neg() + 1).sqrt() / (1 - kept),
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(0, dtype=torch.int32)}
    return {name: table.float() for name, table in tables.items()} | counters


def write_folder(folder: Path, networks: Mapping[str, Any]) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        **VariancePreserving().scheduler_options(), clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        **networks,
        tokenizer=_tokenizers.clip_tokenizer(folder / "tokenizer"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


TOYS.register("sd")(Toy(write=write, script="train_network", options={"network_module": "networks.lora"}))
