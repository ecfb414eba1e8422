"""A kind of adapter in one file: the change of every weight is the product of a column and a row, a rank of 1.

    PYTHONPATH=examples/extend sfumato train --network_module vector_adapter ...

The class is found by its name in ADAPTERS, in files by the ends of its tensors' keys. docs/extending.md explains it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest
from sfumato.config.base import Options, option
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

ROW, COLUMN = "vector_row", "vector_column"


class VectorOptions(Options):
    """What `--network_args` may have beside what every kind of adapter takes."""

    vector_start: float = option(0.1, "about how large the numbers of the row are at first", gt=0)


@ADAPTERS.register("vector")
class Vector(Adapter):
    """W + alpha * column ⊗ row. --network_dim has no meaning here."""

    label = "Vector"
    spellings = {ROW: ROW, COLUMN: COLUMN}  # noqa: RUF012  (declared as a class variable by Adapter)
    options_class = VectorOptions
    dim_meaning = "nothing: the rank is always 1"

    def __init__(self, group: LayerGroup, row: Tensor, column: Tensor, alpha: float) -> None:
        super().__init__(group)
        device = group.layers[0].weight.device
        self.alpha = alpha
        self.vector_row = nn.Parameter(row.to(device))
        self.vector_column = nn.Parameter(column.to(device))

    @property
    def known_rank(self) -> int | None:
        return None

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        """The column is 0, so that nothing changes at first; the row is drawn from the run's seed."""
        options, weight = request.options, group.layers[0].weight
        assert isinstance(options, VectorOptions)
        row = torch.zeros(math.prod(weight.shape[1:]))
        if request.generator is not None:
            row.normal_(std=options.vector_start, generator=request.generator)
        return cls(group, row, torch.zeros(group.num_rows), request.alpha)

    def delta(self, i: int) -> Tensor:
        """A group is one layer, or several whose rows a file has in one tensor: `take_rows` knows which."""
        column = self.group.take_rows(self.vector_column, i)
        return self.alpha * torch.outer(column, self.vector_row).reshape(self.group.layers[i].weight.shape)

    # What follows is for files.

    def export_tensors(self) -> dict[str, Tensor]:
        return {ROW: self.vector_row, COLUMN: self.vector_column, "alpha": torch.tensor(self.alpha)}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        return cls(group, tensors[ROW].float(), tensors[COLUMN].float(), float(tensors["alpha"]))

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        layer.check_complete((ROW, COLUMN))
        return {ROW: layer.tensors[ROW], COLUMN: layer.tensors[COLUMN], "alpha": torch.tensor(layer.find_alpha(1))}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (len(tensors[COLUMN]), len(tensors[ROW]))
