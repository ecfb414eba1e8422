"""The files of Lumina-Image 2.0 besides its transformer and text encoder: the autoencoder and the tokenizer."""

from __future__ import annotations

from pathlib import Path

from sfumato.config import ModelOptions
from sfumato.families import _gemma2, _vae
from sfumato.families._file_kinds import CHANNELS_FAULT, check_network_size
from sfumato.families._gemma2_tokenizer import GemmaTokenizer, find_gemma_tokenizer, load_gemma_tokenizer
from sfumato.families._tokenizers import check_vocabulary_size
from sfumato.families.blueprint import Blueprint
from sfumato.families.hub_models import find_tokenizer_path
from sfumato.families.part import Network
from sfumato.families.source import Source

_TEXT = "text_encoders."  # in files with the whole model
LUMINA_TEXT_PREFIX = _TEXT + "gemma2_2b.transformer."
_VAE_SCALING = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def read_lumina_vae(source: Source, denoiser: Network) -> Network:
    """From a file with the whole model, or a file or folder of the autoencoder."""
    vae = _vae.read_vae_option(source, _VAE_SCALING, option="ae")
    check_network_size("ae", source.path, CHANNELS_FAULT, vae.config["latent_channels"], denoiser.config["in_channels"])
    return vae


def find_tokenizer(blueprint: Blueprint, model: ModelOptions) -> GemmaTokenizer:
    """Raises UserError where there is none, or one of another vocabulary than the text encoder's."""
    tokenizer = _load_tokenizer(blueprint, model)
    check_vocabulary_size(tokenizer.size, blueprint.networks["gemma2"].config["vocab_size"], owner="Gemma 2")
    return tokenizer


def _load_tokenizer(blueprint: Blueprint, model: ModelOptions) -> GemmaTokenizer:
    """--tokenizer, else beside the checkpoint or the text encoder, in its file, or in the hub's cache."""
    if model.tokenizer:
        return load_gemma_tokenizer(find_tokenizer_path(model.tokenizer[0]))
    source = blueprint.source
    folders = [(source.path if source.is_folder else source.path.parent) / "tokenizer"]
    if model.gemma2:
        folders += [Path(model.gemma2), Path(model.gemma2).parent / "tokenizer"]
    cached = blueprint.find_cached_tokenizer("gemma2")
    folders += [cached] if cached else []
    keys = (_gemma2.TOKENIZER_KEY, _TEXT + _gemma2.TOKENIZER_KEY)
    return find_gemma_tokenizer(folders, blueprint.networks["gemma2"].weights.file, keys)
