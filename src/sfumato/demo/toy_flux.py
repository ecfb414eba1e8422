"""The toy FLUX.1: transformer, CLIP-L, T5 and autoencoder in a file each, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.demo import toy_sd
from sfumato.demo.toy import TOY_WORDS, TOYS, Layout, Toy
from sfumato.demo.weights import make_random_network
from sfumato.families import _clip, _flux_keys, _t5, _tokenizers, _vae
from sfumato.formats.checkpoint_writer import write_safetensors

_HEAD_DIM, _NUM_HEADS = 32, 2
TEXT_WIDTH = _HEAD_DIM * _NUM_HEADS  # also of the text encoders
LATENT_CHANNELS = 16  # channels; a token is a patch of 2x2
MODULATION_OPTIONS = ("pooled_projection_dim", "guidance_embeds")  # of the transformer's configuration
FLUX_VAE_CONFIG = toy_sd.SD_VAE_CONFIG | {
    "latent_channels": LATENT_CHANNELS,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    words = _tokenizers.write_toy_clip_tokenizer(folder / "tokenizer", TOY_WORDS)
    pieces = _tokenizers.write_toy_t5_tokenizer(folder / "tokenizer_2", TOY_WORDS)
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


def make_networks(clip_vocabulary: int, t5_vocabulary: int, *, guided: bool, seed: int) -> dict[str, Any]:
    """The four networks; with vocabularies of these sizes."""
    return {
        "transformer": make_random_network(_flux_keys.build, make_flux_config(guided), seed=seed, purpose="flux dit"),
        "text_encoder": make_random_network(
            _clip.build, toy_sd.make_clip_config(clip_vocabulary), seed=seed, purpose="flux clip"
        ),
        "text_encoder_2": make_random_network(_t5.build, make_t5_config(t5_vocabulary), seed=seed, purpose="flux t5"),
        "vae": make_random_network(_vae.build, FLUX_VAE_CONFIG, seed=seed, purpose="flux vae"),
    }


def make_flux_config(guided: bool) -> dict[str, Any]:
    return {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": _HEAD_DIM,
        "num_attention_heads": _NUM_HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "guidance_embeds": guided,
        "axes_dims_rope": [_HEAD_DIM // 8, _HEAD_DIM * 7 // 16, _HEAD_DIM * 7 // 16],
    }


def make_t5_config(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "d_model": TEXT_WIDTH,
        "d_kv": _HEAD_DIM,
        "d_ff": 2 * TEXT_WIDTH,
        "num_layers": 2,
        "num_heads": _NUM_HEADS,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "gated-gelu",
    }


def single_files(networks: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Option -> tensors of its file, under the keys of published files."""
    return {
        "pretrained_model_name_or_path": _flux_keys.FLUX_KEYS.to_original(networks["transformer"].state_dict()),
        "clip_l": _clip.key_map().to_original(networks["text_encoder"].state_dict()),
        "t5xxl": to_t5_keys(networks["text_encoder_2"]),
        "ae": to_vae_keys(networks["vae"]),
    }


def to_t5_keys(encoder: Any) -> dict[str, Tensor]:
    """A T5's tensors, the shared embedding once."""
    return {name: tensor for name, tensor in encoder.state_dict().items() if name not in _t5.TIED_WEIGHTS}


def to_vae_keys(vae: Any) -> dict[str, Tensor]:
    return _vae.key_map(len(FLUX_VAE_CONFIG["block_out_channels"])).to_original(vae.state_dict())


def write_folder(folder: Path, networks: Mapping[str, Any], *, guided: bool) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes
    pipeline = library.FluxPipeline(
        **networks,
        tokenizer=_tokenizers.load_clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=_tokenizers.load_t5_tokenizer(folder / "tokenizer_2"),
        scheduler=library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided, shift=3.0 if guided else 1.0),
    )
    pipeline.save_pretrained(folder)


FLUX_TOY_OPTIONS = {
    "network_module": "networks.lora_flux",
    "timestep_sampling": "flux_shift",
    "model_prediction_type": "raw",
    "guidance_scale": "1.0",
}
TOYS.register("flux")(
    Toy(
        write=write,
        script="flux_train_network",
        options=FLUX_TOY_OPTIONS,
        variants=("dev", "schnell"),
    )
)
