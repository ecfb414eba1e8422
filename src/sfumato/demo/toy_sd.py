"""The toy Stable Diffusion 1 and 2: a checkpoint in the original layout, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.demo.toy import TOY_WORDS, TOYS, Layout, Toy
from sfumato.demo.weights import make_random_network
from sfumato.diffusion.objective import VariancePreserving
from sfumato.families import _clip, _open_clip, _tokenizers, _unet, _vae
from sfumato.families.part import DENOISER_PREFIX
from sfumato.families.sd import CLIP_PREFIX, OPEN_CLIP_PREFIX
from sfumato.formats.checkpoint_writer import write_safetensors

CLIP_WIDTH = 64  # of the text encoder
SD_UNET_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 64, 64],
    "layers_per_block": 1,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "cross_attention_dim": CLIP_WIDTH,
    "attention_head_dim": 8,  # diffusers' name for the number of heads
}
SD2_UNET_CONFIG = SD_UNET_CONFIG | {
    "block_out_channels": [32, 64, 128, 128],
    "attention_head_dim": [1, 1, 2, 2],  # heads of 64 channels
    "use_linear_projection": True,
}
SD_VAE_CONFIG = {
    "block_out_channels": [32, 32, 64, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    words = _tokenizers.write_toy_clip_tokenizer(folder / "tokenizer", TOY_WORDS)
    networks = make_networks(words, seed) if variant == "1" else make_sd2_networks(words, seed)
    if layout == "diffusers":
        write_folder(folder, networks, variant)
        return {"pretrained_model_name_or_path": folder, "tokenizer": folder / "tokenizer"}
    path = folder / "toy_sd.safetensors"
    tensors = single_file(networks) if variant == "1" else sd2_single_file(networks, words, seed)
    write_safetensors(path, tensors, {"format": "pt"})
    return {"pretrained_model_name_or_path": path, "tokenizer": folder / "tokenizer"}


def make_networks(vocabulary: int, seed: int) -> dict[str, Any]:
    """The three networks; `vocabulary` is the tokenizer's size."""
    return {
        "unet": make_random_network(_unet.build, SD_UNET_CONFIG, seed=seed, purpose="sd unet"),
        "vae": make_random_network(_vae.build, SD_VAE_CONFIG, seed=seed, purpose="sd vae"),
        "text_encoder": make_random_network(_clip.build, make_clip_config(vocabulary), seed=seed, purpose="sd clip"),
    }


def make_sd2_networks(vocabulary: int, seed: int) -> dict[str, Any]:
    """The three networks of Stable Diffusion 2."""
    return make_networks(vocabulary, seed) | {
        "unet": make_random_network(_unet.build, SD2_UNET_CONFIG, seed=seed, purpose="sd unet"),
        "text_encoder": make_open_clip(vocabulary, seed, layers=2),
    }


def make_open_clip(vocabulary: int, seed: int, *, layers: int) -> Any:
    """An OpenCLIP text encoder of any depth; the layers that two depths share are equal."""
    config = make_clip_config(vocabulary) | {"hidden_act": "gelu", "num_hidden_layers": layers}
    return make_random_network(_clip.build, config, seed=seed, purpose="sd open clip")


def make_clip_config(vocabulary: int) -> dict[str, Any]:
    """A CLIP text encoder of two layers; the tokenizer's begin and end tokens are its last two."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": CLIP_WIDTH,
        "projection_dim": CLIP_WIDTH,
        "intermediate_size": 2 * CLIP_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "max_position_embeddings": _clip.CLIP_LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def single_file(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the published keys, with those that training left in it."""
    clip = _clip.key_map().to_original(networks["text_encoder"].state_dict())
    clip["text_model.embeddings.position_ids"] = torch.arange(_clip.CLIP_LENGTH)[None]
    return (
        to_unet_and_vae_keys(networks)
        | {CLIP_PREFIX + name: tensor for name, tensor in clip.items()}
        | make_training_buffers()
    )


def sd2_single_file(networks: Mapping[str, Any], vocabulary: int, seed: int) -> dict[str, Tensor]:
    """A checkpoint of Stable Diffusion 2, whose text encoder has one layer more than is used."""
    whole = make_open_clip(vocabulary, seed, layers=3)
    clip = _open_clip.key_map(projected=False).to_original(whole.state_dict())
    clip |= {"text_projection": torch.eye(CLIP_WIDTH), "logit_scale": torch.tensor(4.6)}
    return (
        to_unet_and_vae_keys(networks)
        | {OPEN_CLIP_PREFIX + name: tensor for name, tensor in clip.items()}
        | make_training_buffers()
    )


def to_unet_and_vae_keys(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """The UNet and the autoencoder under the published keys, as in every checkpoint of Stable Diffusion 1 and 2."""
    unet = _unet.key_map(networks["unet"].config).to_original(networks["unet"].state_dict())
    levels = len(networks["vae"].config["block_out_channels"])
    vae = _vae.key_map(levels).to_original(networks["vae"].state_dict())
    return {
        **{DENOISER_PREFIX + name: tensor for name, tensor in unet.items()},
        **{_vae.VAE_PREFIX + name: tensor for name, tensor in vae.items()},
    }


def make_training_buffers() -> dict[str, Tensor]:
    """The schedule's buffers and the EMA's counters, which loading must ignore."""
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


def write_folder(folder: Path, networks: Mapping[str, Any], variant: str) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes
    objective = VariancePreserving(predicts="v" if variant == "2-v" else "epsilon")
    scheduler = library.DDIMScheduler(
        **objective.scheduler_options(), clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipeline = library.StableDiffusionPipeline(
        **networks,
        tokenizer=_tokenizers.load_clip_tokenizer(folder / "tokenizer", pad_with_zero=variant != "1"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


TOYS.register("sd")(
    Toy(
        write=write,
        script="train_network",
        options={"network_module": "networks.lora"},
        variants=("1", "2", "2-v"),
        variant_options={"2": {"v2": ""}, "2-v": {"v2": "", "v_parameterization": ""}},
    )
)
