"""Layer groups and layers of files without a model, for tests of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from sfumato.adapters.base import Adapter
from sfumato.adapters.kinds import list_kinds
from sfumato.formats.adapter_kind import FileLayer, Kinds, find_kinds, list_tensor_names
from sfumato.formats.groups import LayerGroup, find_layers, group_layers
from sfumato.formats.keymap import KeyMap, make_identity_map
from sfumato.formats.peft_config import PeftConfig


def make_group(module: nn.Module, adapter_map: KeyMap | None = None) -> LayerGroup:
    layers = find_layers(module)
    (group,) = group_layers(layers, ("{*}",), part="a", prefix="x", adapter_map=adapter_map or make_identity_map())
    return group


def complete(tensors: Mapping[str, Tensor], config: PeftConfig | None = None) -> tuple[Kinds, dict[str, Tensor]]:
    """A layer of a file as its reader gives it."""
    kinds = find_kinds(tensors, [kind for kind in list_kinds().values() if kind.spellings])
    found: dict[str, Tensor] = {}
    for kind in kinds:
        own = {name: tensor for name, tensor in tensors.items() if name in list_tensor_names(kind)}
        found |= kind.complete(FileLayer(path=Path("file"), name="x", tensors=own, config=config))
    return kinds, found


def draw(adapter: Adapter, std: float = 0.5) -> None:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=std)
