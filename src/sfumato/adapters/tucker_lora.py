"""LoRA of convolutions in three parts (LyCORIS' `use_tucker`): the kernel is in a small core between two matrices.

The change is up (rows, r) · core (r, r, kernel) · down (r, columns), a Tucker decomposition with a rank of r on both
sides (Kim et al. 2016, "Compression of deep convolutional neural networks", eq. 4): r * r * kernel + r * columns
numbers in the place of LoRA's r * columns * kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Generator, Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter
from sfumato.adapters.formed_change import limit_product
from sfumato.adapters.lora import LoRA
from sfumato.adapters.lora_files import DOWN, MIDDLE, SPELLINGS, UP, complete_matrices, find_factors, name_for_peft
from sfumato.config.base import Options, option
from sfumato.formats.adapter_keys import ALPHA
from sfumato.formats.adapter_kind import FileLayer, LayerMatch, LayerTensors, take_whole
from sfumato.formats.groups import LayerGroup, is_pointwise

OWN_SPELLINGS = {MIDDLE: MIDDLE}  # which tell its files from LoRA's


class TuckerOptions(Options):
    """The argument of LoRA in three parts."""

    use_tucker: bool = option(False, "give convolutions matrices without their kernel, with a core of it between")


@ADAPTERS.register("tucker_lora")
class TuckerLoRA(LoRA):
    """A LoRA whose down matrix is the product of the core and `lora_down`, which is small and formed in each step."""

    label = "Tucker LoRA"
    spellings = OWN_SPELLINGS
    plain_spellings = SPELLINGS
    replaces = "lora"
    options_class = TuckerOptions
    has_perturbation = False

    def __init__(self, group: LayerGroup, *, rank: int, alpha: float, generator: Generator | None = None) -> None:
        super().__init__(group, rank=rank, alpha=alpha)
        weight = group.layers[0].weight
        on = "meta" if weight.is_meta else "cpu"
        down = torch.empty(rank, weight.shape[1], *[1] * (weight.ndim - 2), device=on)
        core = torch.empty(rank, rank, *weight.shape[2:], device=on)
        for values in (down, core) if generator is not None and not weight.is_meta else ():
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        self.lora_down = nn.Parameter(down.to(weight.device))
        self.lora_mid = nn.Parameter(core.to(weight.device))

    @classmethod
    def is_wanted(cls, options: Options, group: LayerGroup | None) -> bool:
        assert isinstance(options, TuckerOptions)
        return options.use_tucker and (group is None or not is_pointwise(group.layers[0]))

    def take_matrices(self, i: int) -> tuple[Tensor, Tensor]:
        down = fold(self.lora_mid, self.lora_down).reshape(self.rank, *self.group.layers[i].weight.shape[1:])
        return down, self.group.take_rows(self.lora_up, i)

    @torch.no_grad()
    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        return limit_product(self, maximum)

    # ------------------------------------------------------------ files

    def export_tensors(self) -> LayerTensors:
        return {**super().export_tensors(), MIDDLE: self.lora_mid}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        adapter = super().from_tensors(group, tensors, inner)
        with torch.no_grad():
            adapter.lora_mid.copy_(tensors[MIDDLE].reshape(adapter.lora_mid.shape))
        return adapter

    @classmethod
    def owns(cls, tensors: Mapping[str, Tensor]) -> bool:
        return MIDDLE in tensors

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        complete, core = complete_matrices(layer), layer.tensors[MIDDLE]
        rank = len(complete[DOWN])
        if core.ndim != 4 or core.shape[:2] != (rank, rank) or complete[DOWN][0, 0].numel() != 1:
            raise layer.make_mismatch_error(DOWN, MIDDLE)
        return {**complete, MIDDLE: core}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (len(tensors[UP]), tensors[DOWN].shape[1], *tensors[MIDDLE].shape[2:])

    join = staticmethod(take_whole)

    @staticmethod
    def to_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return find_factors(fold_tensors(tensors))

    @staticmethod
    def to_peft(match: LayerMatch) -> list[LayerTensors]:
        return name_for_peft(LayerMatch(match.name, match.view, match.kinds, fold_tensors(match.tensors)))


def fold(core: Tensor, down: Tensor) -> Tensor:
    """core (r, r, kernel) after down (r, columns, ...): (r, columns, kernel)."""
    return torch.einsum("orhw,ri->oihw", core, down.flatten(1))


def fold_tensors(tensors: Mapping[str, Tensor]) -> LayerTensors:
    """The tensors of the LoRA that makes the same change."""
    return {DOWN: fold(tensors[MIDDLE].float(), tensors[DOWN].float()), UP: tensors[UP], ALPHA: tensors[ALPHA]}
