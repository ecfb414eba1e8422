"""Adapter files for the tests of tools: of any kind and toy model, with random values on all layers that it adapts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from families.toys import ToyShelf
from sfumato.config import Config, NetworkOptions, NoiseOptions, OptimOptions
from sfumato.config.memory import MemoryOptions
from sfumato.config.run import LoopOptions
from sfumato.families.base import Family, find_family
from sfumato.families.source import open_source
from sfumato.memory.low_precision import choose_formats
from sfumato.methods import make_method

MODEL = "pretrained_model_name_or_path"
ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl", "gemma2": "gemma2"}  # part -> option
ALL_PARTS = {"flux": {"train_t5xxl": True}, "sd3": {"train_t5xxl": True}, "chroma": {"train_t5xxl": True}}


def draw_adapter(
    model: Family, path: Path, *, seed: int = 1, std: float = 0.05, dtype: torch.dtype | None = None, **network: Any
) -> Path:
    """An adapter of all parts that the options adapt, at an alpha / rank that is no power of two."""
    options = {"network_dim": 2, "network_alpha": 3.0, **network}
    config = Config(
        network=NetworkOptions(**options), optim=OptimOptions(learning_rate=1.0), loop=LoopOptions(seed=seed)
    )
    method: Any = make_method(config)
    method.plan(model.blueprint)
    method.prepare(model)
    for i, parameter in enumerate(method.modules.parameters()):
        noise = nn.init.normal_(torch.empty_like(parameter), std=std, generator=torch.Generator().manual_seed(seed + i))
        with torch.no_grad():
            parameter.add_(noise)
    path.parent.mkdir(parents=True, exist_ok=True)
    method.write(model, path, {"ss_base_model_version": "toy", "ss_network_dim": "2"}, dtype)
    method.engine.detach()
    return path


def load_files(
    toy_shelf: ToyShelf,
    family: str,
    variant: str = "",
    *,
    files: Mapping[str, Path],
    memory: MemoryOptions | None = None,
) -> Family:
    """A toy with some of its files in place of the shelf's, e.g. merged ones. memory: precision of its weights."""
    tokenizers = [
        path for name, path in toy_shelf.paths(family, variant=variant).items() if name.startswith("tokenizer")
    ]
    given: dict[str, Any] = {name: str(path) for name, path in files.items()}
    given["tokenizer"] = tuple(map(str, tokenizers))
    options = toy_shelf.options(family, variant=variant).model_copy(update=given)
    source = open_source(options)
    cls = find_family(None, source)
    blueprint = cls.read(source, options, NoiseOptions())
    model = cls(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))
    choose_formats(model, memory or MemoryOptions())
    model.load()
    return model


def list_encoder_options(toy_shelf: ToyShelf, family: str, variant: str = "") -> list[str]:
    """The text encoders of a toy that have files of their own, by their options."""
    return [name for name in toy_shelf.paths(family, variant=variant) if name in ENCODERS.values()]


def make_merge_command(
    toy_shelf: ToyShelf, family: str, files: list[Path], folder: Path, variant: str = ""
) -> list[str]:
    """`sfumato lora merge` into the toy and its encoders; every file has its own name in the folder."""
    paths = toy_shelf.paths(family, variant=variant)
    command = ["lora", "merge", *map(str, files), "--model", str(paths[MODEL]), "--save_to"]
    command += [str(folder / paths[MODEL].name)]
    for option in list_encoder_options(toy_shelf, family, variant):
        command += [f"--{option}", str(paths[option]), f"--{option}_save_to", str(folder / paths[option].name)]
    return command


def list_merged_files(toy_shelf: ToyShelf, family: str, folder: Path, variant: str = "") -> dict[str, Path]:
    """Option -> what that command has written."""
    paths = toy_shelf.paths(family, variant=variant)
    return {name: folder / paths[name].name for name in (MODEL, *list_encoder_options(toy_shelf, family, variant))}
