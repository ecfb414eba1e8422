"""LoHa (Hyeon-Woo et al. 2022, "FedPara", prop. 2): W + alpha / rank * (a1 b1) ⊙ (a2 b2), products of single elements.

Its rank is up to the square of that of its four matrices. Those of a convolution have the kernel in their columns, or
a core of the kernel's size between them (Tucker decomposition, prop. 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest
from sfumato.adapters.formed_change import (
    add_parameters,
    apply_formed,
    drop_rows,
    export_parameters,
    limit_product,
    make_zeros,
)
from sfumato.config.base import Options, option
from sfumato.formats.adapter_keys import ALPHA, SCALAR
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

A1, B1, T1 = "hada_w1_a", "hada_w1_b", "hada_t1"
A2, B2, T2 = "hada_w2_a", "hada_w2_b", "hada_t2"
MATRICES = (A1, B1, A2, B2)
TENSORS = (*MATRICES, T1, T2)
SPELLINGS = {f"{name}{end}": name for name in TENSORS for end in ("", ".default")}  # the second is PEFT's, at times
START_STD = {A1: 0.1, B1: 1.0, A2: 0.0, B2: 1.0, T1: 0.1, T2: 0.1}  # LyCORIS' start values


class LohaOptions(Options):
    """The arguments of LoHa."""

    use_tucker: bool = option(False, "give convolutions matrices without their kernel, with a core of it between")


@ADAPTERS.register("loha")
class LoHa(Adapter):
    """The change is formed for each layer from its rows of the first matrices.

    rank_dropout drops rows of the change, the same for the whole batch.
    """

    label = "LoHa"
    spellings = SPELLINGS
    options_class = LohaOptions
    dim_meaning = "the rank of each of the two products"
    plus_params = (A2,)
    linear_tensors = (A1,)
    has_norm_limit = True
    dropouts = frozenset({"rank", "module"})

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter | None
    hada_t2: nn.Parameter | None

    def __init__(self, group: LayerGroup, tensors: Mapping[str, Tensor], *, alpha: float) -> None:
        """tensors: under the names above, without alpha."""
        super().__init__(group)
        self.alpha = alpha
        add_parameters(self, TENSORS, tensors)

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        """Drawn from normal distributions; one matrix is 0."""
        options = request.options
        assert isinstance(options, LohaOptions)
        tensors = make_zeros(group, _choose_shapes(group, request.rank, use_tucker=options.use_tucker))
        for name, tensor in tensors.items():
            if START_STD[name] and request.generator is not None and not tensor.is_meta:
                nn.init.normal_(tensor, std=START_STD[name], generator=request.generator)
        return cls(group, tensors, alpha=request.alpha)

    @property
    def known_rank(self) -> int:
        return len(self.hada_w1_b)

    @property
    def scale(self) -> float:
        return self.alpha / self.known_rank

    def delta(self, i: int) -> Tensor:
        first = self._multiply(self.hada_w1_a, self.hada_w1_b, self.hada_t1, i)
        second = self._multiply(self.hada_w2_a, self.hada_w2_b, self.hada_t2, i)
        return (self.scale * first * second).reshape(self.group.layers[i].weight.shape)

    def _multiply(self, a: Tensor, b: Tensor, core: Tensor | None, i: int) -> Tensor:
        """The i-th layer's rows of a b (rows, columns), or with a core between them (rows, columns, kernel)."""
        if core is None:
            return self.group.take_rows(a, i) @ b.flatten(1)
        return torch.einsum("abhw,ao,bn->onhw", core, self.group.take_rows(a.t(), i).t(), b)

    def forward(self, x: Tensor, i: int) -> Tensor:
        return drop_rows(self, apply_formed(self.group.layers[i], x, lambda: self.delta(i)), i)

    @torch.no_grad()
    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        return limit_product(self, maximum)

    # ------------------------------------------------------------ files

    def export_tensors(self) -> dict[str, Tensor]:
        return export_parameters(self)

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        own = {name: tensors[name].float() for name in TENSORS if name in tensors}
        return cls(group, own, alpha=float(tensors[ALPHA]))

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        """The matrices and alpha; scalar is multiplied into the first matrix."""
        tensors = {name: layer.tensors[name] for name in TENSORS if name in layer.tensors}
        layer.check_complete((*MATRICES, *((T1, T2) if T1 in tensors or T2 in tensors else ())))
        _check_shapes(layer, tensors)
        if SCALAR in layer.tensors:
            tensors[A1] = tensors[A1].float() * layer.tensors[SCALAR].float().reshape(())
        return {**tensors, ALPHA: torch.tensor(layer.find_alpha(len(tensors[B1])))}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        if T1 in tensors:
            return (tensors[A1].shape[1], tensors[B1].shape[1], *tensors[T1].shape[2:])
        return (len(tensors[A1]), math.prod(tensors[B1].shape[1:]))


def _choose_shapes(group: LayerGroup, rank: int, *, use_tucker: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a group's adapter."""
    columns, *kernel = group.layers[0].weight.shape[1:]
    a, b = (group.num_rows, rank), (rank, columns * math.prod(kernel))
    if not use_tucker or all(size == 1 for size in kernel):
        return {A1: a, B1: b, A2: a, B2: b}
    a, b, core = (rank, group.num_rows), (rank, columns), (rank, rank, *kernel)
    return {T1: core, T2: core, A1: a, B1: b, A2: a, B2: b}


def _check_shapes(layer: FileLayer, tensors: Mapping[str, Tensor]) -> None:
    """UserError for tensors that do not belong together."""
    ranks_of_a = 0 if T1 in tensors else 1
    for a, b, core in ((A1, B1, T1), (A2, B2, T2)):
        first, second = tensors[a], tensors[b]
        if min(first.ndim, second.ndim) < 2 or 0 in (*first.shape, *second.shape):
            raise layer.make_mismatch_error(a, b)
        rank = len(second)
        if first.shape[ranks_of_a] != rank:
            raise layer.make_mismatch_error(a, b)
        if core in tensors and (tensors[core].ndim != 4 or tensors[core].shape[:2] != (rank, rank)):
            raise layer.make_mismatch_error(core, b)
    for one, other in ((A1, A2), (B1, B2)):
        if tensors[one].numel() != tensors[other].numel():
            raise layer.make_mismatch_error(one, other)
