"""The toy FLUX.1: transformer, CLIP-L, T5 and autoencoder in a file each, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.demo import toy_sd
from sfumato.demo.toy import TOYS, WORDS, Layout, Toy
from sfumato.demo.weights import random_network
from sfumato.families import _clip, _flux_keys, _t5, _tokenizers, _vae
from sfumato.formats.checkpoint import write_safetensors

HEAD, HEADS = 32, 2
WIDTH = HEAD * HEADS  # also of the text encoders
LATENT = 16  # channels; a token is a patch of 2x2
MODULATION = ("pooled_projection_dim", "guidance_embeds")  # of the transformer's configuration
VAE_CONFIG = toy_sd.VAE_CONFIG | {
    "latent_channels": LATENT,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    words = _tokenizers.toy_tokenizer(folder / "tokenizer", WORDS)
    pieces = _tokenizers.toy_t5_tokenizer(folder / "tokenizer_2", WORDS)
    networks = make_networks(words, pieces, guided=variant == "dev", seed=seed)
    tokenizers = {name: folder / name for name in ("tokenizer", "tokenizer_2")}
    if layout == "diffusers":
        write_folder(folder, networks, guided=variant == "dev")
        return {"pretrained_model_name_or_path": folder, **tokenizers}
    files = single_files(networks)
    names = {"pretrained_model_name_or_path": f"toy_flux_{variant}", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}
    paths = {option: folder / f"{name}.safetensors" for option, name in names.items()}
    for option, path in paths.items():
        write_safetensors(path, files[option], {"format": "pt"})
    return paths | tokenizers


def make_networks(words: int, pieces: int, *, guided: bool, seed: int) -> dict[str, Any]:
    """The four networks; `words` and `pieces` are the sizes of CLIP's and T5's vocabularies."""
    return {
        "transformer": random_network(_flux_keys.build, transformer_config(guided), seed=seed, purpose="flux dit"),
        "text_encoder": random_network(_clip.build, toy_sd.clip_config(words), seed=seed, purpose="flux clip"),
        "text_encoder_2": random_network(_t5.build, t5_config(pieces), seed=seed, purpose="flux t5"),
        "vae": random_network(_vae.build, VAE_CONFIG, seed=seed, purpose="flux vae"),
    }


def transformer_config(guided: bool) -> dict[str, Any]:
    return {
        "in_channels": 4 * LATENT,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": HEAD,
        "num_attention_heads": HEADS,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": guided,
        "axes_dims_rope": [HEAD // 8, HEAD * 7 // 16, HEAD * 7 // 16],
    }


def t5_config(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "d_model": WIDTH,
        "d_kv": HEAD,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "num_heads": HEADS,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "gated-gelu",
    }


def single_files(networks: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Option -> entries of its file, in the layouts that the field passes around."""
    return {
        "pretrained_model_name_or_path": _flux_keys.KEYS.to_original(networks["transformer"].state_dict()),
        "clip_l": _clip.key_map().to_original(networks["text_encoder"].state_dict()),
        "t5xxl": t5_file(networks["text_encoder_2"]),
        "ae": vae_file(networks["vae"]),
    }


def t5_file(encoder: Any) -> dict[str, Tensor]:
    """A text encoder's entries, the embedding once."""
    return {name: tensor for name, tensor in encoder.state_dict().items() if name not in _t5.TIED}


def vae_file(vae: Any) -> dict[str, Tensor]:
    return _vae.key_map(len(VAE_CONFIG["block_out_channels"])).to_original(vae.state_dict())


def write_folder(folder: Path, networks: Mapping[str, Any], *, guided: bool) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes
    pipeline = library.FluxPipeline(
        **networks,
        tokenizer=_tokenizers.clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=_tokenizers.t5_tokenizer(folder / "tokenizer_2"),
        scheduler=library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided, shift=3.0 if guided else 1.0),
    )
    pipeline.save_pretrained(folder)


TOYS.register("flux")(
    Toy(
        write=write,
        script="flux_train_network",
        options={
            "network_module": "networks.lora_flux",
            "timestep_sampling": "flux_shift",
            "model_prediction_type": "raw",
            "guidance_scale": "1.0",
        },
        variants=("dev", "schnell"),
    )
)
