"""One more factor of a change, which trains from 0 on (LyCORIS' `use_scalar`): all matrices start from drawn values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Generator, Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, Dropout
from sfumato.config.base import Options, option
from sfumato.data.batch import Tensors
from sfumato.errors import InternalError
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

SPELLINGS: dict[str, str] = {}


class ScalarOptions(Options):
    """The argument of the factor, which wraps kinds of low rank."""

    use_scalar: bool = option(False, "one more factor of the change, from 0 on; no matrix starts from 0 then")


@ADAPTERS.register("trained_scalar")
class TrainedScalar(Adapter):
    """In files the factor is multiplied into a matrix; a run that goes on from one starts with 1."""

    label = "factor"
    is_wrapper = True
    spellings = SPELLINGS  # its files are those of the kind within
    options_class = ScalarOptions
    dropouts = frozenset({"neuron", "rank", "module"})

    def __init__(self, inner: Adapter, factor: float) -> None:
        super().__init__(inner.group)
        self.inner = inner
        self.alpha = inner.alpha
        self.plus_params = inner.plus_params
        self.scalar = nn.Parameter(torch.tensor(factor, device=inner.group.layers[0].weight.device))

    @classmethod
    def is_wanted(cls, options: Options, group: LayerGroup | None) -> bool:
        assert isinstance(options, ScalarOptions)
        return options.use_scalar

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        assert request.inner is not None
        if request.generator is not None and not group.layers[0].weight.is_meta:
            draw_zeros(request.inner, request.generator)
        return cls(request.inner, 0.0)

    @property
    def known_rank(self) -> int | None:
        return self.inner.known_rank

    def set_dropout(self, dropout: Dropout) -> None:
        self.inner.set_dropout(dropout)

    def configure(self, options: Options) -> None:
        self.inner.configure(options)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "scalar", self.scalar
        yield from self.inner.trainable()

    def delta(self, i: int) -> Tensor:
        return self.scalar * self.inner.delta(i)

    def forward(self, x: Tensor, i: int) -> Tensor:
        change = self.inner(x, i)
        return self.scalar.to(change.dtype) * change

    def export_tensors(self) -> Tensors:
        tensors = dict(self.inner.export_tensors())
        name = next(name for name in self.inner.linear_tensors if name in tensors)
        return {**tensors, name: tensors[name] * self.scalar}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        assert inner is not None
        return cls(inner, 1.0)

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        raise InternalError("no file has it")

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        raise InternalError("the shape is that of the adapter that is wrapped")


@torch.no_grad()
def draw_zeros(adapter: Adapter, generator: Generator) -> None:
    """Draw the matrices that are 0, as linear layers' weights are drawn."""
    for parameter in adapter.parameters():
        if not parameter.any():
            values = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.copy_(values)
