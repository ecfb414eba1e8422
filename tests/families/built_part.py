"""A network with its data, built for a test without any file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sfumato.families.part import PartSpec
from sfumato.formats.groups import LayerGroup, find_layers


@dataclass(kw_only=True)
class BuiltPart:
    """What a Part says of its layers."""

    spec: PartSpec
    module: nn.Module

    def groups(self, *, every: bool = False) -> list[LayerGroup]:
        return self.spec.groups(find_layers(self.module), every=every)
