"""(IA)3 (Liu et al. 2022, sec. 3.3), as LyCORIS has it: one factor 1 + w for each output or each input of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from sfumato.adapters.base import (
    ADAPTERS,
    Adapter,
    AdapterRequest,
    add_change,
    apply_weight,
    drop_module,
    over_channels,
    remove_bias,
)
from sfumato.common.text import plural
from sfumato.config.base import Options, option
from sfumato.errors import UserError
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

WEIGHT, ON_INPUT = "weight", "on_input"
SPELLINGS, PLAIN_SPELLINGS = {"on_input": ON_INPUT}, {"weight": WEIGHT}


class Ia3Options(Options):
    """The arguments of (IA)3."""

    train_on_input: bool = option(False, "one factor for each input of a layer, and not for each output")


@ADAPTERS.register("ia3")
class IA3(Adapter):
    """W is multiplied with 1 + w, along its rows or its columns; biases stay as they are."""

    label = "(IA)3"
    reads_weights = True
    spellings = SPELLINGS
    plain_spellings = PLAIN_SPELLINGS
    options_class = Ia3Options
    dim_meaning = "without effect, but 0 gives a layer none"
    uses_rank = False
    takes_wrappers = False
    dropouts = frozenset({"module"})
    alpha = 1.0

    def __init__(self, group: LayerGroup, factors: Tensor, *, on_input: bool) -> None:
        """factors: w (rows of the group,), or (columns,) for those of the input."""
        super().__init__(group)
        self.on_input = on_input
        self.weight = nn.Parameter(factors.to(group.layers[0].weight.device))

    @property
    def known_rank(self) -> None:
        return None

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        options, weight = request.options, group.layers[0].weight
        assert isinstance(options, Ia3Options)
        count = weight.shape[1] if options.train_on_input else group.num_rows
        return cls(group, torch.zeros(count, device=weight.device), on_input=options.train_on_input)

    def delta(self, i: int) -> Tensor:
        weight = self.group.layers[i].weight.float()
        shape = (1, -1) if self.on_input else (-1, 1)
        return weight * self._take_factors(i).reshape(*shape, *[1] * (weight.ndim - 2))

    def _take_factors(self, i: int) -> Tensor:
        return self.weight if self.on_input else self.group.take_rows(self.weight, i)

    def forward(self, x: Tensor, i: int) -> Tensor:
        layer = self.group.layers[i]
        factors, weight = over_channels(layer, self._take_factors(i)).to(x.dtype), layer.weight.to(x.dtype)
        if self.on_input:
            return self._drop(apply_weight(layer, x * factors, weight))
        return self._drop(apply_weight(layer, x, weight) * factors)

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        """Factors of the output need no second product with the weight."""
        if self.on_input:
            return super().add_to(output, x, i, strength)
        layer = self.group.layers[i]
        factors = over_channels(layer, self._take_factors(i)).to(output.dtype)
        return add_change(output, self._drop(remove_bias(layer, output) * factors), strength)

    def _drop(self, change: Tensor) -> Tensor:
        module = self.dropout.module
        return drop_module(change, module) if module and self.training else change

    # ------------------------------------------------------------ files

    def export_tensors(self) -> dict[str, Tensor]:
        """The factors of convolutions have the shape (1, channels, 1, 1)."""
        dimensions = self.group.layers[0].weight.ndim
        factors = self.weight if dimensions == 2 else self.weight.reshape(1, -1, *[1] * (dimensions - 2))
        return {WEIGHT: factors, ON_INPUT: torch.tensor(int(self.on_input))}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        on_input, factors = bool(tensors[ON_INPUT]), tensors[WEIGHT].float().flatten()
        count = group.layers[0].weight.shape[1] if on_input else group.num_rows
        if len(factors) != count:
            raise UserError(
                f"{group.name} has {plural(len(factors), 'factor')} in the file, where the model's layer has {count} "
                + ("inputs" if on_input else "outputs"),
                code="factors-of-other-layer",
            )
        return cls(group, factors, on_input=on_input)

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        layer.check_complete((WEIGHT,))
        return {name: layer.tensors[name] for name in (WEIGHT, ON_INPUT)}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """A kernel's size is not told, and so is no number of columns."""
        return (0 if bool(tensors[ON_INPUT]) else tensors[WEIGHT].numel(), 0)
