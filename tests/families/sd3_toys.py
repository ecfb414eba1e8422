"""Help for tests of Stable Diffusion 3: its toys loaded, and what they predict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from families.loading import load_model, read_model
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes
from sfumato.families import _vae
from sfumato.families._sd3_text import ENCODER_LOCATIONS
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.encoding import encode_with_grad
from sfumato.families.part import DENOISER_PREFIX

CAPTIONS = ["a cat", "a red cup of coffee on a wooden table with a cat and a dog"]


def options_of(**given: Any) -> ModelOptions:
    return ModelOptions(**{name: str(value) if isinstance(value, Path) else value for name, value in given.items()})


def read(noise: NoiseOptions | None = None, **given: Any) -> Blueprint:
    return read_model(options_of(**given), noise, "sd3")


def load(dtype: torch.dtype = torch.float32, **given: Any) -> Any:
    return load_model(options_of(**given), dtype, family="sd3")


def checkpoint(toy: Mapping[str, Path]) -> dict[str, Any]:
    """The option that names the toy's checkpoint; its tokenizers lie beside it."""
    return {"pretrained_model_name_or_path": toy["pretrained_model_name_or_path"]}


def elsewhere(path: Path, toy: Mapping[str, Path]) -> dict[str, Any]:
    """The options for a checkpoint that the toy's tokenizers do not lie beside."""
    folders = tuple(str(toy[name]) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    return {"pretrained_model_name_or_path": path, "tokenizer": folders}


def conditioning(model: Family, captions: list[str], spoil: float = 0.0) -> dict[str, Tensor]:
    """With `spoil`, text beyond the masks is replaced by that value."""
    features = {part: encode_with_grad(model, part, captions) for part in model.text_parts}
    for found in features.values():
        if "mask" in found:
            found["hidden"] = found["hidden"].masked_fill(~found["mask"][..., None], spoil)
    return model.condition(features, Sizes.from_size(len(captions), 64, 64), None)


def prediction(model: Family, captions: list[str], spoil: float = 0.0) -> Tensor:
    x = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(x, torch.full((len(captions),), 500.0), conditioning(model, captions, spoil))


def part_of(file: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in file.items() if key.startswith(prefix)}


def without(file: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """The checkpoint's entries but those of some text encoders."""
    prefixes = tuple(ENCODER_LOCATIONS[part].prefix for part in parts)
    return {key: tensor for key, tensor in file.items() if not key.startswith(prefixes)}


def separate(file: Mapping[str, Tensor], folder: Path) -> dict[str, str]:
    """Option -> a file of its own."""
    pieces = {"pretrained_model_name_or_path": DENOISER_PREFIX, "vae": _vae.VAE_PREFIX}
    pieces |= {place.option: place.prefix for place in ENCODER_LOCATIONS.values()}
    for option, prefix in pieces.items():
        save_file(part_of(file, prefix), folder / f"{option}.safetensors")
    return {option: str(folder / f"{option}.safetensors") for option in pieces}
