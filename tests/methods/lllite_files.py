"""Help for tests of LLLite's second version: files whose weights are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sfumato.adapters.control_modules import ControlModules
from sfumato.adapters.lllite_file import read_lllite_file
from sfumato.adapters.lllite_shared import SharedLLLite
from sfumato.adapters.lllite_trunk import LLLiteSizes
from sfumato.families.base import Family


def read_layers(model: Family, file: Path) -> ControlModules:
    list_layers = type(model).list_controlled_layers
    assert list_layers is not None
    return read_lllite_file(file, list_layers(model.blueprint), model.latents)


def write_drawn_file(model: Family, path: Path, **more: Any) -> Path:
    """Modules of every layer of the model, all of whose weights are drawn. more: sizes of the trunk."""
    list_layers = type(model).list_controlled_layers
    assert list_layers is not None
    sizes = LLLiteSizes(width=8, image_width=4, trunk_width=6, residual_blocks=2, has_pyramid=True, **more)
    made = SharedLLLite(list_layers(model.blueprint), sizes)
    draw = torch.Generator().manual_seed(2)
    state = {name: torch.randn(tensor.shape, generator=draw) / 3 for name, tensor in made.parts.state_dict().items()}
    save_file(state, path)
    return path
