"""The toy Stable Diffusion 3: one checkpoint with all its encoders, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.demo import toy_flux, toy_sd, toy_sdxl
from sfumato.demo.toy import TOY_WORDS, TOYS, Layout, Toy
from sfumato.demo.weights import make_random_network
from sfumato.families import _clip, _open_clip, _sd3_keys, _t5, _tokenizers, _vae
from sfumato.families._sd3_patches import make_sinusoids
from sfumato.families._sd3_text import ENCODER_LOCATIONS
from sfumato.families.sd3 import SD3_SHIFT, SD3_VAE_SCALING
from sfumato.formats.checkpoint_writer import write_safetensors

_NUM_HEADS, _NUM_LAYERS = 2, 3
_T5_WIDTH = 256  # channels of T5, more than both CLIPs have together
_TABLE_SIDE = 24  # side of the table of positions, in patches
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
SD3_VAE_CONFIG = toy_flux.FLUX_VAE_CONFIG | SD3_VAE_SCALING
CLIP_G_CONFIG = {
    "hidden_size": toy_sdxl.CLIP_G_WIDTH,
    "projection_dim": toy_sdxl.CLIP_G_PROJECTION,
    "intermediate_size": 2 * toy_sdxl.CLIP_G_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": toy_sdxl.CLIP_G_WIDTH // 64,
    "hidden_act": "gelu",
}
SD3_VARIANTS: dict[str, dict[str, Any]] = {
    "3-medium": {"dual_attention_layers": [], "qk_norm": None},
    "3.5-medium": {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
    "3.5-large": {"dual_attention_layers": [], "qk_norm": "rms_norm"},
}


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    words = max(_tokenizers.write_toy_clip_tokenizer(folder / name, TOY_WORDS) for name in _TOKENIZERS[:2])
    pieces = _tokenizers.write_toy_t5_tokenizer(folder / _TOKENIZERS[2], TOY_WORDS)
    networks = make_networks(words, pieces, variant=variant, seed=seed)
    tokenizers = {name: folder / name for name in _TOKENIZERS}
    if layout == "diffusers":
        write_folder(folder, networks)
        return {"pretrained_model_name_or_path": folder, **tokenizers}
    path = folder / f"toy_sd{variant}.safetensors"
    write_safetensors(path, single_file(networks), {"format": "pt"})
    return {"pretrained_model_name_or_path": path, **tokenizers}


def make_networks(clip_vocabulary: int, t5_vocabulary: int, *, variant: str, seed: int) -> dict[str, Any]:
    """The five networks; with vocabularies of these sizes."""
    clip_l = toy_sd.make_clip_config(clip_vocabulary)
    pooled = clip_l["projection_dim"] + CLIP_G_CONFIG["projection_dim"]
    dit = make_random_network(_sd3_keys.build, make_sd3_config(variant, pooled), seed=seed, purpose="sd3 dit")
    dit.pos_embed.pos_embed = make_position_table(_TABLE_SIDE, dit.inner_dim)
    t5 = toy_flux.make_t5_config(t5_vocabulary) | {"d_model": _T5_WIDTH}
    encoder = _open_clip.build_projected
    return {
        "transformer": dit,
        "vae": make_random_network(_vae.build, SD3_VAE_CONFIG, seed=seed, purpose="sd3 vae"),
        "text_encoder": make_random_network(encoder, clip_l, seed=seed, purpose="sd3 clip l"),
        "text_encoder_2": make_random_network(encoder, clip_l | CLIP_G_CONFIG, seed=seed, purpose="sd3 clip g"),
        "text_encoder_3": make_random_network(_t5.build, t5, seed=seed, purpose="sd3 t5"),
    }


def make_sd3_config(variant: str, pooled: int) -> dict[str, Any]:
    width = _NUM_HEADS * _sd3_keys._HEAD_CHANNELS
    return {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": toy_flux.LATENT_CHANNELS,
        "out_channels": toy_flux.LATENT_CHANNELS,
        "num_layers": _NUM_LAYERS,
        "attention_head_dim": _sd3_keys._HEAD_CHANNELS,
        "num_attention_heads": _NUM_HEADS,
        "joint_attention_dim": _T5_WIDTH,
        "caption_projection_dim": width,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": _TABLE_SIDE,
        **SD3_VARIANTS[variant],
    }


def make_position_table(side: int, width: int) -> Tensor:
    """(1, side * side, width): sines and cosines of a patch's column, then of its row."""
    waves = make_sinusoids(torch.arange(side, dtype=torch.float64) / 3, width // 2).float()
    columns, rows = waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)


def single_file(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the published keys, with all text encoders."""
    transformer = _sd3_keys.key_map(_NUM_LAYERS).to_original(networks["transformer"].state_dict())
    vae = _vae.key_map(len(toy_sd.SD_VAE_CONFIG["block_out_channels"])).to_original(networks["vae"].state_dict())
    entries = {toy_sd.DENOISER_PREFIX + name: tensor for name, tensor in transformer.items()}
    entries |= {_vae.VAE_PREFIX + name: tensor for name, tensor in vae.items()}
    for part, place in ENCODER_LOCATIONS.items():
        state = networks[place.folder].state_dict()
        kept = {name: tensor for name, tensor in state.items() if name not in _t5.TIED_WEIGHTS}
        entries |= {place.prefix + name: tensor for name, tensor in kept.items()}
        if part != "t5":
            entries[place.prefix + "text_model.embeddings.position_ids"] = torch.arange(_clip.CLIP_LENGTH)[None]
    return entries


def write_folder(folder: Path, networks: Mapping[str, Any]) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes
    pipeline = library.StableDiffusion3Pipeline(
        **networks,
        tokenizer=_tokenizers.load_clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=_tokenizers.load_clip_tokenizer(folder / "tokenizer_2", pad_with_zero=True),
        tokenizer_3=_tokenizers.load_t5_tokenizer(folder / "tokenizer_3"),
        scheduler=library.FlowMatchEulerDiscreteScheduler(shift=SD3_SHIFT),
    )
    pipeline.save_pretrained(folder)


TOYS.register("sd3")(
    Toy(
        write=write,
        script="sd3_train_network",
        options={"network_module": "networks.lora_sd3"},
        variants=("3-medium", "3.5-medium", "3.5-large"),
    )
)
