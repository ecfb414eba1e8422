"""--base_weights: adapter files that become part of the model, merged each time a network's weights are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.adapters.base import merge_adapter
from sfumato.adapters.lora import LoRA
from sfumato.families.base import Family
from sfumato.families.part import PartSpec, WeightChange
from sfumato.formats.groups import find_layers
from sfumato.formats.hashes import calculate_sha256
from sfumato.formats.lora import TensorsByGroup, read_adapter_file
from sfumato.methods.adapter_builder import GroupsByPart, iterate_adapters, match_names

ChangesByPart = Mapping[str, list[WeightChange]]


def read_base_weights(
    files: Iterable[tuple[Path, float]], specs: Mapping[str, PartSpec], groups: GroupsByPart
) -> ChangesByPart:
    """What the files change in each part, in their order. UserError where one does not fit the model.

    files: with their multipliers. specs: of every part that can be adapted. groups: part -> every adaptable layer.
    """
    part_of = {group.name: part for part, own in groups.items() for group in own}
    changes: dict[str, list[WeightChange]] = defaultdict(list)
    for path, multiplier in files:
        entries = match_names(path, read_adapter_file(path), specs, groups)
        for _ in iterate_adapters(path, entries, specs, groups):
            pass  # building one checks it
        by_part: dict[str, dict[str, Mapping[str, Tensor]]] = defaultdict(dict)
        for name, tensors in entries.items():
            by_part[part_of[name]][name] = tensors
        for part, own in by_part.items():
            merge = partial(merge_entries, specs[part], own, multiplier)
            changes[part].append(WeightChange(identity=f"{calculate_sha256(path)} x {multiplier}", apply=merge))
    return changes


@torch.no_grad()
def merge_entries(spec: PartSpec, entries: TensorsByGroup, multiplier: float, network: nn.Module) -> None:
    """Add the changes of adapters, by the names of their layer groups, to a network's weights."""
    for group in spec.groups(find_layers(network), every=True):
        if group.name in entries:
            merge_adapter(LoRA.from_tensors(group, entries[group.name]), multiplier)


def register_changes(model: Family, changes: ChangesByPart) -> None:
    """Have the changes made whenever a network's weights are read."""
    for part, own in changes.items():
        for change in own:
            model.parts[part].add_change(change)
