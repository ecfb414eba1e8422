"""GLoRA (Chavan et al. 2023, eq. 10), as LyCORIS has it: W + alpha / rank * (W A + B), with A and B of low rank.

A = a1 a2 changes the input of the layer's own weight; B = b1 b2 is what LoRA has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, apply_weight, drop_module
from sfumato.formats.adapter_keys import ALPHA, SCALAR
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

IN_UP, IN_DOWN = "a1.weight", "a2.weight"
OUT_UP, OUT_DOWN, OUT_MIDDLE = "b1.weight", "b2.weight", "bm.weight"
PAIRS = (IN_UP, IN_DOWN, OUT_UP, OUT_DOWN)
SPELLINGS = {name: name for name in (*PAIRS, OUT_MIDDLE)}


@ADAPTERS.register("glora")
class GLoRA(Adapter):
    """a1 (columns, rank), a2 (rank, columns) and b2 (rank, columns, kernel) are the group's; b1 (rows, rank) is cut."""

    label = "GLoRA"
    reads_weights = True
    spellings = SPELLINGS
    dim_meaning = "the rank of each of the two products"
    takes_wrappers = False
    dropouts = frozenset({"module"})

    def __init__(self, group: LayerGroup, tensors: Mapping[str, Tensor], *, alpha: float) -> None:
        """tensors: under the names above, without alpha; a kernel is that of the layer in b2, else 1."""
        super().__init__(group)
        device = group.layers[0].weight.device
        self.alpha = alpha
        self.a1, self.a2, self.b1, self.b2 = (nn.Parameter(tensors[name].to(device)) for name in PAIRS)

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        """The first matrices are drawn as linear layers' weights are, the second ones are 0."""
        columns, *kernel = group.layers[0].weight.shape[1:]
        ones, rank, is_meta = [1] * len(kernel), request.rank, group.layers[0].weight.is_meta
        tensors = {
            IN_UP: torch.zeros(columns, rank, *ones, device="meta" if is_meta else "cpu"),
            IN_DOWN: torch.zeros(rank, columns, *ones, device="meta" if is_meta else "cpu"),
            OUT_UP: torch.zeros(group.num_rows, rank, *ones, device="meta" if is_meta else "cpu"),
            OUT_DOWN: torch.zeros(rank, columns, *kernel, device="meta" if is_meta else "cpu"),
        }
        for name in (IN_UP, OUT_UP):
            if request.generator is not None and not is_meta:
                nn.init.kaiming_uniform_(tensors[name], a=math.sqrt(5), generator=request.generator)
        return cls(group, tensors, alpha=request.alpha)

    @property
    def known_rank(self) -> int:
        return len(self.a2)

    @property
    def scale(self) -> float:
        return self.alpha / self.known_rank

    def delta(self, i: int) -> Tensor:
        weight, a1, a2 = self.group.layers[i].weight, self.a1.flatten(1), self.a2.flatten(1)
        changed = torch.einsum("oi...,ir,rj->oj...", weight.to(a1.dtype), a1, a2)
        added = self.group.take_rows(self.b1, i).flatten(1) @ self.b2.flatten(1)
        return self.scale * (changed + added.reshape(weight.shape))

    def forward(self, x: Tensor, i: int) -> Tensor:
        """W (a1 a2 x) + b1 (b2 x): no change of a weight is formed."""
        layer, up = self.group.layers[i], self.group.take_rows(self.b1, i)
        a1, a2, b1, b2 = (matrix.to(x.dtype) for matrix in (self.a1, self.a2, up, self.b2))
        if isinstance(layer, nn.Linear):
            moved = F.linear(F.linear(x, a2) * self.scale, a1)
            added = F.linear(F.linear(x, b2) * self.scale, b1)
        else:
            moved = F.conv2d(F.conv2d(x, a2) * self.scale, a1)
            added = F.conv2d(apply_weight(layer, x, b2) * self.scale, b1)
        change = apply_weight(layer, moved, layer.weight.to(x.dtype)) + added
        module = self.dropout.module
        return drop_module(change, module) if module and self.training else change

    # ------------------------------------------------------------ files

    def export_tensors(self) -> dict[str, Tensor]:
        tensors = dict(zip(PAIRS, (self.a1, self.a2, self.b1, self.b2), strict=True))
        return {**tensors, ALPHA: torch.tensor(float(self.alpha))}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        kernel = group.layers[0].weight.shape[2:]
        own = {name: tensors[name].float().reshape(*tensors[name].shape[:2], *[1] * len(kernel)) for name in PAIRS[:3]}
        columns = group.layers[0].weight.shape[1]
        own[OUT_DOWN] = tensors[OUT_DOWN].float().reshape(-1, columns, *kernel)
        return cls(group, own, alpha=float(tensors[ALPHA]))

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        """The matrices and alpha. scalar is multiplied into a2 and b2, and a middle matrix of convolutions into b2."""
        layer.check_complete(PAIRS)
        tensors = {name: layer.tensors[name] for name in PAIRS}
        if any(tensor.ndim < 2 or 0 in tensor.shape for tensor in tensors.values()):
            raise layer.make_mismatch_error(IN_UP, OUT_UP)
        for up, down in ((IN_UP, IN_DOWN), (OUT_UP, OUT_DOWN), (OUT_UP, IN_DOWN)):
            if tensors[up].shape[1] != len(tensors[down]):
                raise layer.make_mismatch_error(up, down)
        if len(tensors[IN_UP]) != tensors[IN_DOWN].shape[1] or tensors[IN_UP].shape[2:].numel() != 1:
            raise layer.make_mismatch_error(IN_UP, IN_DOWN)
        if OUT_MIDDLE in layer.tensors:
            tensors[OUT_DOWN] = _fold_middle(layer)
        if SCALAR in layer.tensors:
            for name in (IN_DOWN, OUT_DOWN):
                tensors[name] = tensors[name].float() * layer.tensors[SCALAR].float().reshape(())
        return {**tensors, ALPHA: torch.tensor(layer.find_alpha(len(tensors[IN_DOWN])))}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (len(tensors[OUT_UP]), *tensors[OUT_DOWN].shape[1:])


def _fold_middle(layer: FileLayer) -> Tensor:
    """b2 (rank, columns, kernel) of a middle matrix (rank, rank, kernel) after b2 (rank, columns, 1, 1)."""
    middle, down = layer.tensors[OUT_MIDDLE], layer.tensors[OUT_DOWN]
    if middle.ndim != 4 or middle.shape[:2] != (len(down), len(down)) or down[0, 0].numel() != 1:
        raise layer.make_mismatch_error(OUT_DOWN, OUT_MIDDLE)
    return torch.einsum("orhw,ri->oihw", middle.float(), down.flatten(1).float())
