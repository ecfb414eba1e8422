"""Published models by name, from their configurations alone: a model folder whose files have headers and no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sfumato.common import files
from sfumato.common.registry import did_you_mean
from sfumato.errors import UserError
from sfumato.families import _gemma2_tokenizer, _t5, _tokenizers
from sfumato.families._builders import make_builders
from sfumato.families.source import MODEL_INDEX, read_json
from sfumato.families.weights import on_meta
from sfumato.formats.checkpoint import SAFETENSORS_DTYPES
from sfumato.formats.checkpoint_writer import write_header_only

PUBLISHED = Path(__file__).parent / "assets" / "published"
_WORDS = ("a", "photo", "of")  # of the stand-ins for tokenizers: a rehearsal needs lengths, not ids


def list_published() -> list[str]:
    """The names of all models whose configurations are known."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def read_published(name: str) -> dict[str, Any]:
    """A model's title, pipeline, resolution in pixels, dtype of its weights, and by folder its networks and tokenizers;
    "references": how many reference images it takes, where it takes any.

    Raises UserError for a name that is not known.
    """
    if name not in list_published():
        raise UserError(
            f"there is no published model {name!r} among those known here",
            code="published-model-unknown",
            fix=did_you_mean(name, list_published()),
        )
    content = read_json(PUBLISHED / f"{name}.json")
    networks: dict[str, Any] = {}
    for folder, network in content["networks"].items():
        shared = isinstance(network, str)
        networks[folder] = read_json(PUBLISHED / "networks" / f"{network}.json") if shared else network
    return {**content, "networks": networks}


def build_published(config: Mapping[str, Any]) -> nn.Module:
    """The network of a published configuration, its parameters on the meta device."""
    name = config.get("_class_name") or config["architectures"][0]
    return on_meta(lambda: make_builders()[name](config))


def write_published(name: str, folder: Path) -> Path:
    """Write the model into `folder` in diffusers' layout, its weight files with headers alone; gives the folder.

    Everything that reads headers works on it; reading a weight is a UserError. Tokenizers that no package contains
    are stand-ins with a few words.
    """
    content = read_published(name)
    dtype = SAFETENSORS_DTYPES[content["dtype"]]
    index: dict[str, Any] = {"_class_name": content["pipeline"]}
    for part, config in content["networks"].items():
        files.write_text(folder / part / "config.json", json.dumps(config, indent=2))
        state = build_published(config).state_dict()
        specs = {key: (dtype, tensor.shape) for key, tensor in state.items() if key not in _t5.TIED_WEIGHTS}
        stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
        write_header_only(folder / part / f"{stem}.safetensors", specs)
        index[part] = _get_entry(config)
    files.write_text(folder / MODEL_INDEX, json.dumps(index, indent=2))
    for part, kind in content["tokenizers"].items():
        _write_tokenizer(folder / part, kind, content["networks"])
    if "scheduler" in content:
        files.write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(content["scheduler"]))
    return folder


def _get_entry(config: Mapping[str, Any]) -> list[str]:
    """[library, class] of a network, its entry in the index."""
    if "_class_name" in config:
        return ["diffusers", config["_class_name"]]
    return ["transformers", config["architectures"][0]]


def _write_tokenizer(folder: Path, kind: str, networks: Mapping[str, Any]) -> None:
    if kind == "t5":
        _tokenizers.write_toy_t5_tokenizer(folder, _WORDS)
    else:
        size = networks["text_encoder"]["vocab_size"]
        _gemma2_tokenizer.write_toy_gemma_tokenizer(folder, _WORDS, size=size)
