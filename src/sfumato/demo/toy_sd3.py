"""The toy Stable Diffusion 3: one checkpoint with all its encoders, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.demo import toy_flux, toy_sd, toy_sdxl
from sfumato.demo.toy import TOYS, WORDS, Layout, Toy
from sfumato.demo.weights import random_network
from sfumato.families import _clip, _open_clip, _sd3_keys, _t5, _tokenizers, _vae
from sfumato.families._sd3_patches import sinusoids
from sfumato.families._sd3_text import PLACES
from sfumato.families.sd3 import PREFIX, SHIFT, VAE_FACTS
from sfumato.formats.checkpoint import write_safetensors

HEADS, BLOCKS = 2, 3
TEXT = 256  # channels of T5, more than both CLIPs have together
TABLE = 24  # side of the table of positions, in patches
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
VAE_CONFIG = toy_flux.VAE_CONFIG | VAE_FACTS
CLIP_G_CONFIG = {
    "hidden_size": toy_sdxl.WIDTH_G,
    "projection_dim": toy_sdxl.POOLED,
    "intermediate_size": 2 * toy_sdxl.WIDTH_G,
    "num_hidden_layers": 3,
    "num_attention_heads": toy_sdxl.WIDTH_G // 64,
    "hidden_act": "gelu",
}
KINDS: dict[str, dict[str, Any]] = {
    "3-medium": {"dual_attention_layers": [], "qk_norm": None},
    "3.5-medium": {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
    "3.5-large": {"dual_attention_layers": [], "qk_norm": "rms_norm"},
}


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    words = max(_tokenizers.toy_tokenizer(folder / name, WORDS) for name in TOKENIZERS[:2])
    pieces = _tokenizers.toy_t5_tokenizer(folder / TOKENIZERS[2], WORDS)
    networks = make_networks(words, pieces, variant=variant, seed=seed)
    tokenizers = {name: folder / name for name in TOKENIZERS}
    if layout == "diffusers":
        write_folder(folder, networks)
        return {"pretrained_model_name_or_path": folder, **tokenizers}
    path = folder / f"toy_sd{variant}.safetensors"
    write_safetensors(path, single_file(networks), {"format": "pt"})
    return {"pretrained_model_name_or_path": path, **tokenizers}


def make_networks(words: int, pieces: int, *, variant: str, seed: int) -> dict[str, Any]:
    """The five networks; `words` and `pieces` are the sizes of CLIP's and T5's vocabularies."""
    clip_l = toy_sd.clip_config(words)
    pooled = clip_l["projection_dim"] + CLIP_G_CONFIG["projection_dim"]
    dit = random_network(_sd3_keys.build, transformer_config(variant, pooled), seed=seed, purpose="sd3 dit")
    dit.pos_embed.pos_embed = position_table(TABLE, dit.inner_dim)
    t5 = toy_flux.t5_config(pieces) | {"d_model": TEXT}
    encoder = _open_clip.build_projected
    return {
        "transformer": dit,
        "vae": random_network(_vae.build, VAE_CONFIG, seed=seed, purpose="sd3 vae"),
        "text_encoder": random_network(encoder, clip_l, seed=seed, purpose="sd3 clip l"),
        "text_encoder_2": random_network(encoder, clip_l | CLIP_G_CONFIG, seed=seed, purpose="sd3 clip g"),
        "text_encoder_3": random_network(_t5.build, t5, seed=seed, purpose="sd3 t5"),
    }


def transformer_config(variant: str, pooled: int) -> dict[str, Any]:
    width = HEADS * _sd3_keys.HEAD
    return {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": toy_flux.LATENT,
        "out_channels": toy_flux.LATENT,
        "num_layers": BLOCKS,
        "attention_head_dim": _sd3_keys.HEAD,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": width,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": TABLE,
        **KINDS[variant],
    }


def position_table(side: int, width: int) -> Tensor:
    """(1, side * side, width): sines and cosines of a patch's column, then of its row."""
    waves = sinusoids(torch.arange(side, dtype=torch.float64) / 3, width // 2).float()
    columns, rows = waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)


def single_file(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every entry of a checkpoint as it was published, with all text encoders."""
    transformer = _sd3_keys.key_map(BLOCKS).to_original(networks["transformer"].state_dict())
    vae = _vae.key_map(len(toy_sd.VAE_CONFIG["block_out_channels"])).to_original(networks["vae"].state_dict())
    entries = {PREFIX + name: tensor for name, tensor in transformer.items()}
    entries |= {_vae.PREFIX + name: tensor for name, tensor in vae.items()}
    for part, place in PLACES.items():
        state = networks[place.folder].state_dict()
        kept = {name: tensor for name, tensor in state.items() if name not in _t5.TIED}
        entries |= {place.prefix + name: tensor for name, tensor in kept.items()}
        if part != "t5":
            entries[place.prefix + "text_model.embeddings.position_ids"] = torch.arange(_clip.LENGTH)[None]
    return entries


def write_folder(folder: Path, networks: Mapping[str, Any]) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes
    pipeline = library.StableDiffusion3Pipeline(
        **networks,
        tokenizer=_tokenizers.clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=_tokenizers.clip_tokenizer(folder / "tokenizer_2", pad_with_zero=True),
        tokenizer_3=_tokenizers.t5_tokenizer(folder / "tokenizer_3"),
        scheduler=library.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
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
