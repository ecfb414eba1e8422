"""LoRA for each layer of a group on its own (split_qkv), saved as one LoRA of the whole group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Generator, Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, Dropout
from sfumato.adapters.lora import LoRA
from sfumato.adapters.lora_files import complete_matrices, find_product_shape, join_matrices
from sfumato.config.base import Options, option
from sfumato.errors import UserError
from sfumato.formats.groups import LayerGroup


class SplitOptions(Options):
    """The arguments of LoRA for each layer on its own."""

    split_qkv: bool = option(False, "train the layers of a fused layer, e.g. of qkv, each with matrices of its own")


@ADAPTERS.register("split_lora")
class SplitLoRA(Adapter):
    """A pair of matrices for each layer. In files: the down matrices stacked, the up matrices as a block diagonal.

    A file has one alpha and n times the rank of each of n layers; its alpha is n times larger, too, so that alpha /
    rank, and thus the strength in every program, is what was trained.
    """

    label = "split LoRA"
    replaces = "lora"
    files_of = "lora"
    options_class = SplitOptions
    plus_params = LoRA.plus_params
    linear_tensors = LoRA.linear_tensors
    has_norm_limit = True
    has_perturbation = True
    dropouts = LoRA.dropouts

    def __init__(self, group: LayerGroup, *, rank: int, alpha: float, generator: Generator | None = None) -> None:
        super().__init__(group)
        self.rank, self.alpha = rank, alpha
        groups = [take_layer(group, i) for i in range(len(group.layers))]
        loras = [LoRA(single, rank=rank, alpha=alpha, generator=generator) for single in groups]
        self.layers = nn.ModuleList(loras)

    @classmethod
    def is_wanted(cls, options: Options, group: LayerGroup | None) -> bool:
        assert isinstance(options, SplitOptions)
        return options.split_qkv and (group is None or len(group.layers) > 1)

    @classmethod
    def check(cls, options: Options, groups: Sequence[LayerGroup]) -> None:
        assert isinstance(options, SplitOptions)
        if options.split_qkv and not any(len(group.layers) > 1 for group in groups):
            raise UserError(
                "--network_args split_qkv has no effect: no fused layer trains",
                code="split-qkv-without-fused-layer",
                fix="remove split_qkv",
            )

    @property
    def known_rank(self) -> int:
        return self.rank

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        return cls(group, rank=request.rank, alpha=request.alpha, generator=request.generator)

    @classmethod
    def find_rank_limit(cls, group: LayerGroup) -> int:
        return LoRA.find_rank_limit(group)

    def __getitem__(self, i: int) -> LoRA:
        layer = self.layers[i]
        assert isinstance(layer, LoRA)
        return layer

    def __iter__(self) -> Iterator[LoRA]:
        return (self[i] for i in range(len(self.layers)))

    def set_dropout(self, dropout: Dropout) -> None:
        self.dropout = dropout
        for layer in self:
            layer.set_dropout(dropout)

    def delta(self, i: int) -> Tensor:
        return self[i].delta(0)

    def forward(self, x: Tensor, i: int) -> Tensor:
        return self[i](x, 0)

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        return self[i].add_to(output, x, 0, strength)

    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """Limit each layer's norm; the largest of them, and whether any was larger."""
        norms, larger = zip(*(layer.limit_norm(maximum) for layer in self), strict=True)
        return torch.stack(norms).amax(), torch.stack(larger).any()

    def measure_rows(self) -> tuple[Tensor, Tensor]:
        changes, gradients = zip(*(layer.measure_rows() for layer in self), strict=True)
        return self.group.stack_rows(changes), self.group.stack_rows(gradients)

    def export_tensors(self) -> dict[str, Tensor]:
        count, down = len(self.layers), torch.cat([layer.lora_down for layer in self])
        return {
            "lora_down.weight": down,
            "lora_up.weight": self.group.stack_rows([self._widen_up(i) for i in range(count)]),
            "alpha": torch.tensor(float(self.alpha * count)),
        }

    def _widen_up(self, i: int) -> Tensor:
        """(rows of the layer, n * rank): the up matrix in its own columns, 0 elsewhere."""
        up = self[i].lora_up
        wide = up.new_zeros(len(up), len(self.layers) * self.rank)
        wide[:, i * self.rank : (i + 1) * self.rank] = up
        return wide

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        """From a file in which each layer has ranks of its own; UserError where layers share ranks."""
        joint, count = LoRA.from_tensors(group, tensors), len(group.layers)
        rank = joint.rank // count
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        columns = [slice(i * rank, (i + 1) * rank) for i in range(count)]
        rows = [group.take_rows(up, i) for i in range(count)]
        if joint.rank % count or not _is_block_diagonal(rows, columns):
            raise UserError(
                f"{group.name} has ranks that its {count} layers share: the file was not trained with split_qkv",
                code="split-qkv-shared-ranks",
                fix="remove --network_args split_qkv",
            )
        adapter = cls(group, rank=rank, alpha=joint.alpha / count)
        with torch.no_grad():
            for i, layer in enumerate(adapter):
                layer.lora_down.copy_(down[columns[i]])
                layer.lora_up.copy_(rows[i][:, columns[i]])
        return adapter

    complete = staticmethod(complete_matrices)
    find_weight_shape = staticmethod(find_product_shape)
    join = staticmethod(join_matrices)


def _is_block_diagonal(rows: Sequence[Tensor], columns: Sequence[slice]) -> bool:
    """Whether each layer's rows are 0 outside of its own columns."""
    for matrix, own in zip(rows, columns, strict=True):
        if matrix[:, : own.start].any() or matrix[:, own.stop :].any():
            return False
    return True


def take_layer(group: LayerGroup, i: int) -> LayerGroup:
    """The i-th layer of a group as a group of its own."""
    layer = group.layers[i]
    rows = ((0, layer.weight.shape[0]),)
    return replace(group, name=f"{group.name}.{i}", paths=group.paths[i : i + 1], layers=(layer,), rows=(rows,))
