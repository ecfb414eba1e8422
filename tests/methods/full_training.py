"""Help for tests of full training: runs of it, and the weights before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from families.loading import load_family
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.families.base import find_family
from sfumato.families.source import open_source
from toy_runs import make_arguments, train_toy

Toy = Mapping[str, Path]
CONSTANT_TENSORS = {"sd3": ("pos_embed",)}  # of the denoiser, computed and never trained
UNET, EMA = "model.diffusion_model.", "model_ema."
TEXT = {"sd": ("cond_stage_model.",), "sdxl": ("conditioner.embedders.0.", "conditioner.embedders.1.")}
WITHOUT_GRADIENT = {  # tensors of text encoders that no gradient reaches: tables, and layers after the one that is read
    "sd": ("position_ids",),
    "sdxl": ("position_ids", "logit_scale", "embedders.0.transformer.text_model.encoder.layers.1.", "final_layer_norm"),
}


def make_command(toy: Toy, images: Path, output: Path, **options: Any) -> list[str]:
    """A command line of full training."""
    return make_arguments(toy, images, output, **{"method": "full", "network_dim": None, **options})


def full(toy: Toy, images: Path, output: Path, **options: Any) -> Path:
    return train_toy(toy, images, output, **{"method": "full", "network_dim": None, "learning_rate": "1e-4", **options})


def before(toy: Toy) -> dict[str, torch.Tensor]:
    """The checkpoint that training starts from, without the EMA of its weights."""
    tensors = load_file(toy["pretrained_model_name_or_path"])
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(EMA)}


def changed(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> set[str]:
    assert set(first) == set(second)
    return {name for name in first if not torch.equal(first[name], second[name])}


def loaded(path: Path, toy: Toy) -> dict[str, dict[str, torch.Tensor]]:
    """Every network's weights, under our names."""
    tokenizers = tuple(str(folder) for name, folder in toy.items() if name.startswith("tokenizer"))
    others = {name: str(file) for name, file in toy.items() if name in ("clip_l", "t5xxl", "ae")}
    options = ModelOptions(pretrained_model_name_or_path=str(path), tokenizer=tokenizers, **others)
    source = open_source(options)
    family = find_family(None, source)
    blueprint = family.read(source, options, NoiseOptions())
    model = load_family(family, blueprint, options)
    modules = {name: part.module for name, part in model.parts.items()}
    return {name: dict(module.state_dict()) for name, module in modules.items()}
