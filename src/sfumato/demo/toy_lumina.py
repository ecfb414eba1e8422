"""The toy Lumina-Image 2.0: transformer, Gemma 2 and autoencoder in a file each, or a diffusers folder of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.demo import toy_flux
from sfumato.demo.toy import TOY_WORDS, TOYS, Layout, Toy
from sfumato.demo.weights import make_random_network
from sfumato.families import _gemma2, _lumina_keys, _vae
from sfumato.families._gemma2_tokenizer import write_toy_gemma_tokenizer
from sfumato.formats.checkpoint_writer import write_safetensors

_HEAD_DIM, _NUM_HEADS, _NUM_KV_HEADS = 24, 4, 2  # channels of a head; heads of queries, and of keys and values
_TEXT_WIDTH = 64  # of the text encoder


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    words = write_toy_gemma_tokenizer(folder / "tokenizer", TOY_WORDS)
    networks = make_networks(words, seed=seed)
    if layout == "diffusers":
        write_folder(folder, networks)
        return {"pretrained_model_name_or_path": folder, "tokenizer": folder / "tokenizer"}
    files = single_files(networks)
    names = {"pretrained_model_name_or_path": "toy_lumina", "gemma2": "gemma2", "ae": "ae"}
    paths = {option: folder / f"{name}.safetensors" for option, name in names.items()}
    for option, path in paths.items():
        write_safetensors(path, files[option], {"format": "pt"})
    return paths | {"tokenizer": folder / "tokenizer"}


def make_networks(vocabulary: int, *, seed: int) -> dict[str, Any]:
    """The three networks; `vocabulary` is the size of Gemma's."""
    return {
        "transformer": make_random_network(_lumina_keys.build, make_lumina_config(), seed=seed, purpose="lumina dit"),
        "text_encoder": make_random_network(
            _gemma2.build, make_gemma_config(vocabulary), seed=seed, purpose="lumina gemma"
        ),
        "vae": make_random_network(_vae.build, toy_flux.FLUX_VAE_CONFIG, seed=seed, purpose="lumina vae"),
    }


def make_lumina_config() -> dict[str, Any]:
    return {
        "in_channels": toy_flux.LATENT_CHANNELS,
        "hidden_size": _HEAD_DIM * _NUM_HEADS,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "num_attention_heads": _NUM_HEADS,
        "num_kv_heads": _NUM_KV_HEADS,
        "cap_feat_dim": _TEXT_WIDTH,
        "axes_dim_rope": [_HEAD_DIM // 3] * 3,
    }


def make_gemma_config(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 2 * _TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": _gemma2._HEAD_CHANNELS,
        "query_pre_attn_scalar": _gemma2._HEAD_CHANNELS,
    }


def single_files(networks: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Option -> tensors of its file, under the keys of published files."""
    vae = _vae.key_map(len(toy_flux.FLUX_VAE_CONFIG["block_out_channels"])).to_original(networks["vae"].state_dict())
    return {
        "pretrained_model_name_or_path": _lumina_keys.LUMINA_KEYS.to_original(networks["transformer"].state_dict()),
        "gemma2": _gemma2.GEMMA2_FILE_KEYS.to_original(networks["text_encoder"].state_dict()),
        "ae": vae,
    }


def write_folder(folder: Path, networks: Mapping[str, Any]) -> None:
    import diffusers
    from transformers import GemmaTokenizer

    library: Any = diffusers  # its annotations are narrower than what it takes
    pipeline = library.Lumina2Pipeline(
        **networks,
        tokenizer=GemmaTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=library.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )
    pipeline.save_pretrained(folder)


TOYS.register("lumina")(
    Toy(
        write=write,
        script="lumina_train_network",
        options={"network_module": "networks.lora_lumina", "timestep_sampling": "nextdit_shift"},
    )
)
