"""LoRA for each layer of a group on its own (split_qkv), kept in files as one LoRA of the whole group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Generator, Tensor, nn

from sfumato.adapters.base import Adapter
from sfumato.adapters.lora import Dropout, LoRA
from sfumato.errors import UserError
from sfumato.formats.groups import LayerGroup


class SplitLoRA(Adapter):
    """A pair of matrices for each layer. In files: the downs one below the other, the ups as blocks on a diagonal.

    A file has one alpha and a rank n times that of each of n layers; alpha counts n times there, too, so that
    alpha / rank, and with it the strength in every program, is what was trained.
    """

    boosted = LoRA.boosted
    limited = True

    def __init__(self, group: LayerGroup, *, rank: int, alpha: float, generator: Generator | None = None) -> None:
        super().__init__(group)
        self.rank, self.alpha = rank, alpha
        alone = [LoRA(single(group, i), rank=rank, alpha=alpha, generator=generator) for i in range(len(group.layers))]
        self.layers = nn.ModuleList(alone)

    def __getitem__(self, i: int) -> LoRA:
        layer = self.layers[i]
        assert isinstance(layer, LoRA)
        return layer

    def __iter__(self) -> Iterator[LoRA]:
        return (self[i] for i in range(len(self.layers)))

    @property
    def dropout(self) -> Dropout:
        return self[0].dropout

    @dropout.setter
    def dropout(self, chances: Dropout) -> None:
        for layer in self:
            layer.dropout = chances

    def delta(self, i: int) -> Tensor:
        return self[i].delta(0)

    def forward(self, x: Tensor, i: int) -> Tensor:
        return self[i](x, 0)

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        return self[i].add_to(output, x, 0, strength)

    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """Each layer is held to the maximum; the largest of their norms, and whether any was larger."""
        norms, larger = zip(*(layer.limit_norm(maximum) for layer in self), strict=True)
        return torch.stack(norms).amax(), torch.stack(larger).any()

    def tensors(self) -> dict[str, Tensor]:
        count, down = len(self.layers), torch.cat([layer.lora_down for layer in self])
        return {
            "lora_down.weight": down,
            "lora_up.weight": self.group.assemble([self._place(i) for i in range(count)]),
            "alpha": torch.tensor(float(self.alpha * count)),
        }

    def _place(self, i: int) -> Tensor:
        """(rows of the layer, n * rank): its up matrix in its own columns."""
        up = self[i].lora_up
        wide = up.new_zeros(len(up), len(self.layers) * self.rank)
        wide[:, i * self.rank : (i + 1) * self.rank] = up
        return wide

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor]) -> Self:
        """From a file in which each layer has ranks of its own; one that shares ranks is a UserError."""
        whole, count = LoRA.from_tensors(group, tensors), len(group.layers)
        rank = whole.rank // count
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        own = [slice(i * rank, (i + 1) * rank) for i in range(count)]
        rows = [group.take(up, i) for i in range(count)]
        if whole.rank % count or any(each.any() for each in _off_diagonal(rows, own)):
            raise UserError(
                f"{group.name} has ranks that its {count} layers share: the file was not trained with split_qkv",
                fix="leave --network_args split_qkv out",
            )
        adapter = cls(group, rank=rank, alpha=whole.alpha / count)
        with torch.no_grad():
            for i, layer in enumerate(adapter):
                layer.lora_down.copy_(down[own[i]])
                layer.lora_up.copy_(rows[i][:, own[i]])
        return adapter


def _off_diagonal(rows: Sequence[Tensor], own: Sequence[slice]) -> Iterator[Tensor]:
    """What stands in each layer's rows outside its own columns."""
    for each, columns in zip(rows, own, strict=True):
        yield torch.cat([each[:, : columns.start], each[:, columns.stop :]], dim=1)


def single(group: LayerGroup, i: int) -> LayerGroup:
    """The i-th layer of a group as a group of its own."""
    layer = group.layers[i]
    rows = ((0, layer.weight.shape[0]),)
    return replace(group, name=f"{group.name}.{i}", paths=group.paths[i : i + 1], layers=(layer,), rows=(rows,))
