"""--base_weights: adapter files that become part of the model, merged each time a network's weights are read."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.adapters.base import merge_adapter
from sfumato.adapters.lora import LoRA
from sfumato.families.adapter_names import match_adapter_file
from sfumato.families.base import Family
from sfumato.families.part import PartSpec, WeightChange
from sfumato.formats.adapter_file import LayerTensors, read_adapter_file
from sfumato.formats.checkpoint import view_bytes
from sfumato.formats.groups import find_layers
from sfumato.methods.adapter_builder import GroupsByPart


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """What adapter files change in a model before anything trains."""

    changes: Mapping[str, list[WeightChange]] = field(default_factory=dict)  # by part, in the order of the files
    notes: tuple[str, ...] = ()  # what of the files is not used

    def register(self, model: Family) -> None:
        """Have the changes made whenever a network's weights are read."""
        for part, own in self.changes.items():
            for change in own:
                model.parts[part].add_change(change)


def read_base_weights(
    files: Iterable[tuple[Path, float]], specs: Mapping[str, PartSpec], groups: GroupsByPart
) -> BaseWeights:
    """Read the files, each with its multiplier. UserError where one does not fit the model.

    specs: of every part that can be adapted. groups: part -> every adaptable layer.
    """
    changes: dict[str, list[WeightChange]] = defaultdict(list)
    notes: list[str] = []
    for path, multiplier in files:
        file = read_adapter_file(path)
        notes += file.describe_passed_over()
        entries: dict[str, dict[str, LayerTensors]] = defaultdict(dict)
        for name, adapter in match_adapter_file(file, specs, groups).items():
            entries[adapter.group.part][name] = adapter.make_tensors()
        for part, own in entries.items():
            merge = partial(merge_entries, specs[part], own, multiplier)
            changes[part].append(WeightChange(identity=f"{hash_entries(own)} x {multiplier}", apply=merge))
    return BaseWeights(changes=changes, notes=tuple(notes))


@torch.no_grad()
def merge_entries(spec: PartSpec, entries: Mapping[str, LayerTensors], multiplier: float, network: nn.Module) -> None:
    """Add the changes of adapters, by the names of their layer groups, to a network's weights."""
    for group in spec.groups(find_layers(network), every=True):
        if group.name in entries:
            merge_adapter(LoRA.from_tensors(group, entries[group.name]), multiplier)


def hash_entries(entries: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A hash of all tensors and their names."""
    digest = hashlib.sha256()
    for layer, tensors in sorted(entries.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{layer} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(view_bytes(tensor.contiguous().reshape(-1)))
    return digest.hexdigest()
