"""--network_pre_calc: adapters that are added to the weights before each batch, and taken out for the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sfumato.families.base import Family
from sfumato.formats.groups import find_layers
from sfumato.methods.base_weights import merge_matches
from sfumato.methods.frozen_adapters import FrozenFile

_Strengths = tuple[float, ...]  # of each file


class CalculatedWeights:
    """Has each network's weights at the strengths of the last batch; its own are kept in main memory."""

    def __init__(self, files: Sequence[FrozenFile]) -> None:
        self.files = files
        self.originals: dict[str, list[tuple[Tensor, Tensor]]] = {}  # part -> weights that change, and their own values
        self.applied: dict[str, _Strengths] = {}

    def apply(self, model: Family, strengths: _Strengths) -> None:
        """From now on the weights are those with the adapters at these strengths."""
        for part in dict.fromkeys(part for file in self.files for part in file.matches):
            if self.applied.get(part) != strengths:
                self._change(part, model.parts[part].module, strengths)

    @torch.no_grad()
    def _change(self, part: str, network: nn.Module, strengths: _Strengths) -> None:
        if part not in self.originals:
            self.originals[part] = [
                (weight, weight.detach().cpu().clone()) for weight in self._find_weights(part, network)
            ]
        for weight, own in self.originals[part]:
            weight.copy_(own)
        for file, strength in zip(self.files, strengths, strict=True):
            if strength and part in file.matches:
                merge_matches(file.matches[part], strength, network)
        self.applied[part] = strengths

    def _find_weights(self, part: str, network: nn.Module) -> Iterator[Tensor]:
        """The weights and biases of every layer that a file changes, each once."""
        layers = find_layers(network)
        groups = [match.view.bind(layers) for file in self.files for match in file.matches.get(part, ())]
        modules = dict.fromkeys(layer for group in groups for layer in group.layers)
        for module in modules:
            yield from module.parameters(recurse=False)
