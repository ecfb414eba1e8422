"""The toy Chroma: transformer, T5 and autoencoder in a file each, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.demo import toy_flux
from sfumato.demo.toy import TOYS, WORDS, Layout, Toy
from sfumato.demo.weights import random_network
from sfumato.families import _chroma_keys, _t5, _tokenizers, _vae
from sfumato.formats.checkpoint import write_safetensors


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    name = "tokenizer" if layout == "diffusers" else "tokenizer_2"  # beside a FLUX.1, too
    networks = make_networks(_tokenizers.toy_t5_tokenizer(folder / name, WORDS), seed=seed)
    if layout == "diffusers":
        write_folder(folder, networks)
        return {"pretrained_model_name_or_path": folder, name: folder / name}
    files = single_files(networks)
    names = {"pretrained_model_name_or_path": "toy_chroma", "t5xxl": "t5xxl", "ae": "ae"}
    paths = {option: folder / f"{file}.safetensors" for option, file in names.items()}
    for option, path in paths.items():
        write_safetensors(path, files[option], {"format": "pt"})
    return {**paths, name: folder / name}


def make_networks(pieces: int, *, seed: int) -> dict[str, Any]:
    """The three networks; `pieces` is the size of T5's vocabulary."""
    plain = {k: v for k, v in toy_flux.transformer_config(False).items() if k not in toy_flux.MODULATION}
    config = plain | {"approximator_num_channels": 64, "approximator_hidden_dim": 96, "approximator_layers": 2}
    return {
        "transformer": random_network(_chroma_keys.build, config, seed=seed, purpose="chroma dit"),
        "text_encoder": random_network(_t5.build, toy_flux.t5_config(pieces), seed=seed, purpose="chroma t5"),
        "vae": random_network(_vae.build, toy_flux.VAE_CONFIG, seed=seed, purpose="chroma vae"),
    }


def single_files(networks: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Option -> entries of its file, in the layouts that the field passes around."""
    return {
        "pretrained_model_name_or_path": _chroma_keys.KEYS.to_original(networks["transformer"].state_dict()),
        "t5xxl": toy_flux.t5_file(networks["text_encoder"]),
        "ae": toy_flux.vae_file(networks["vae"]),
    }


def write_folder(folder: Path, networks: Mapping[str, Any]) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes
    pipeline = library.ChromaPipeline(
        **networks,
        tokenizer=_tokenizers.t5_tokenizer(folder / "tokenizer"),
        scheduler=library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    pipeline.save_pretrained(folder)


TOYS.register("chroma")(
    Toy(
        write=write,
        script="flux_train_network",
        options={
            "model_type": "chroma",
            "network_module": "networks.lora_flux",
            "timestep_sampling": "sigmoid",
            "model_prediction_type": "raw",
            "guidance_scale": "0",
        },
        variant_options={"": {"apply_t5_attn_mask": ""}},
    )
)
