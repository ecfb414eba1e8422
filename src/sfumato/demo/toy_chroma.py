"""The toy Chroma: transformer, T5 and autoencoder in a file each, or a diffusers folder of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.demo import toy_flux
from sfumato.demo.toy import TOY_WORDS, TOYS, Layout, Toy
from sfumato.demo.weights import make_random_network
from sfumato.families import _chroma_keys, _t5, _tokenizers, _vae
from sfumato.formats.checkpoint_writer import write_safetensors


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    name = "tokenizer" if layout == "diffusers" else "tokenizer_2"  # so that it may stand beside a FLUX.1
    networks = make_networks(_tokenizers.write_toy_t5_tokenizer(folder / name, TOY_WORDS), seed=seed)
    if layout == "diffusers":
        write_folder(folder, networks)
        return {"pretrained_model_name_or_path": folder, name: folder / name}
    files = single_files(networks)
    names = {"pretrained_model_name_or_path": "toy_chroma", "t5xxl": "t5xxl", "ae": "ae"}
    paths = {option: folder / f"{file}.safetensors" for option, file in names.items()}
    for option, path in paths.items():
        write_safetensors(path, files[option], {"format": "pt"})
    return {**paths, name: folder / name}


def make_networks(vocabulary: int, *, seed: int) -> dict[str, Any]:
    """The three networks; `vocabulary` is the size of T5's."""
    flux = toy_flux.make_flux_config(False)
    config = {option: value for option, value in flux.items() if option not in toy_flux.MODULATION_OPTIONS}
    config |= {"approximator_num_channels": 64, "approximator_hidden_dim": 96, "approximator_layers": 2}
    return {
        "transformer": make_random_network(_chroma_keys.build, config, seed=seed, purpose="chroma dit"),
        "text_encoder": make_random_network(
            _t5.build, toy_flux.make_t5_config(vocabulary), seed=seed, purpose="chroma t5"
        ),
        "vae": make_random_network(_vae.build, toy_flux.FLUX_VAE_CONFIG, seed=seed, purpose="chroma vae"),
    }


def single_files(networks: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Option -> tensors of its file, under the keys of published files."""
    return {
        "pretrained_model_name_or_path": _chroma_keys.CHROMA_KEYS.to_original(networks["transformer"].state_dict()),
        "t5xxl": toy_flux.to_t5_keys(networks["text_encoder"]),
        "ae": toy_flux.to_vae_keys(networks["vae"]),
    }


def write_folder(folder: Path, networks: Mapping[str, Any]) -> None:
    import diffusers

    library: Any = diffusers  # its annotations are narrower than what it takes
    pipeline = library.ChromaPipeline(
        **networks,
        tokenizer=_tokenizers.load_t5_tokenizer(folder / "tokenizer"),
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
