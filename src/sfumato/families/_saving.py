"""A loaded model back into the single file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.families.base import Family
from sfumato.formats.checkpoint import DTYPES, Spec, write_stream
from sfumato.formats.keymap import KeyMap


def save_single_file(model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None = None) -> None:
    """Every key of the original file in its shape: networks with today's weights, everything else copied over.

    dtype: of floating-point tensors; None keeps each as it was in the original file. Written tensor by tensor.
    """
    source = model.blueprint.source
    modules = {name: part.module for name, part in model.parts.items()} | {"vae": model.vae}
    states = {name: module.state_dict() for name, module in modules.items()}
    owned = {entry.key: entry for name in modules for entry in _entries(model, name, states[name])}
    copied = {} if source.is_folder else source.file.header.tensors

    def make(key: str) -> Tensor:
        if key in owned:
            return owned[key].key_map.build(owned[key].original, states[owned[key].network])
        return source.file.read(key)

    specs: dict[str, Spec] = {}
    for key in dict.fromkeys([*copied, *owned]):
        if key in copied:
            kind, shape = DTYPES[copied[key].dtype], copied[key].shape
        else:
            tensor = make(key)
            kind, shape = tensor.dtype, tuple(tensor.shape)
        specs[key] = (dtype if dtype and kind.is_floating_point else kind, shape)
    write_stream(path, specs, make, metadata)


@dataclass(frozen=True)
class _Entry:
    """One key of the file and the network whose tensors it is made of."""

    key: str
    network: str
    key_map: KeyMap
    original: str


def _entries(model: Family, name: str, state: Mapping[str, Tensor]) -> list[_Entry]:
    """A network's keys as the file it came from spells them, else as the original layout does."""
    network, source = model.blueprint.networks[name], model.blueprint.source
    if not source.is_folder and network.weights.file is source.file:
        prefix, key_map = network.weights.prefix, network.weights.key_map
        originals = list(network.weights.originals())
    else:
        prefix, key_map = network.spec.key_prefix, network.spec.key_map
        originals = list(dict.fromkeys(key_map.locate(ours).original for ours in state))
    return [_Entry(prefix + original, name, key_map, original) for original in originals]
