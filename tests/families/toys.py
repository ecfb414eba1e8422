"""Toy models for any test: each is written once a session, when it is first asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.config import ModelOptions
from sfumato.demo.toy import TOYS, Layout, write_toy

Key = tuple[str, Layout, str]


@dataclass
class ToyShelf:
    """Toys by family, layout and variant; their files are shared, so tests only read them."""

    folder: Path
    _written: dict[Key, dict[str, Path]] = field(default_factory=dict)

    def paths(self, family: str, layout: Layout = "original", variant: str = "") -> dict[str, Path]:
        """Component -> path, as `write_toy` gives it."""
        key = (family, layout, variant)
        if key not in self._written:
            folder = self.folder / "_".join(filter(None, key))
            self._written[key] = write_toy(family, folder, layout=layout, variant=variant)
        return self._written[key]

    def options(self, family: str, layout: Layout = "original", variant: str = "", **more: Any) -> ModelOptions:
        """The options of the base model that name the toy, and those without which it is refused."""
        found = self.paths(family, layout, variant)
        named = {name: str(path) for name, path in found.items() if not name.startswith("tokenizer")}
        needed = {name: value or True for name, value in TOYS.get(family).variant_options.get(variant, {}).items()}
        return ModelOptions(**{**named, **needed, **more})


def write_fill_toy(shelf: ToyShelf, folder: Path) -> dict[str, Path]:
    """The toy of FLUX.1 dev as FLUX.1 Fill, with 384 numbers a token; the other files are copied beside it."""
    first, paths = "img_in.weight", shelf.paths("flux")
    shutil.copytree(paths["pretrained_model_name_or_path"].parent, folder)
    tensors = load_file(paths["pretrained_model_name_or_path"])
    weight = torch.randn((len(tensors[first]), 384), generator=torch.Generator().manual_seed(0)) / 12
    save_file({**tensors, first: weight}, folder / "fill.safetensors")
    files = {name: folder / path.name for name, path in paths.items()}
    return {**files, "pretrained_model_name_or_path": folder / "fill.safetensors"}


def in_pieces(state: Mapping[str, Tensor], folder: Path, name: str) -> Path:
    """Two files with an index, as published; every second tensor in each."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for number in range(2):
        shard = f"{name}-{number + 1:05d}-of-00002.safetensors"
        some = dict(list(state.items())[number::2])
        save_file(some, folder / shard)
        places |= dict.fromkeys(some, shard)
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index
