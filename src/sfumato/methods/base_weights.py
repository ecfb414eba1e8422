"""--base_weights: adapter files that become part of the model, merged each time a network's weights are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sfumato.adapters.base import merge_adapter
from sfumato.adapters.kinds import restore_adapter
from sfumato.config.frozen import FrozenAdapter
from sfumato.families.base import Family
from sfumato.families.part import PartSpec, WeightChange
from sfumato.formats.adapter_kind import LayerMatch
from sfumato.formats.groups import find_layers
from sfumato.methods.adapter_builder import GroupsByPart
from sfumato.methods.frozen_adapters import hash_matches, read_frozen_file


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
        file = read_frozen_file(FrozenAdapter(path=path, strength=multiplier), specs, groups)
        notes += file.notes
        for part, found in file.matches.items():
            merge = partial(merge_matches, found, multiplier)
            changes[part].append(WeightChange(identity=f"{hash_matches(found)} x {multiplier}", apply=merge))
    return BaseWeights(changes=changes, notes=tuple(notes))


@torch.no_grad()
def merge_matches(found: Sequence[LayerMatch], multiplier: float, network: nn.Module) -> None:
    """Add the changes of a file's adapters to a network's weights."""
    layers = find_layers(network)
    for match in found:
        merge_adapter(restore_adapter(match.kinds, match.view.bind(layers), match.tensors), multiplier)
