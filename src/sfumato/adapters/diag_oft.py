"""Diag-OFT (Qiu et al. 2023, eq. 4): the outputs of a weight are rotated in blocks, Rᵀ W with R = (I + Q) (I - Q)⁻¹.

As LyCORIS has it, with a factor for each output at wish; sd-scripts' OFT has the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from sfumato.adapters.base import (
    ADAPTERS,
    Adapter,
    AdapterRequest,
    add_change,
    apply_weight,
    remove_bias,
)
from sfumato.adapters.formed_change import apply_formed, drop_rows
from sfumato.adapters.lokr import factorize
from sfumato.adapters.rotations import find_rotation_difference, limit_skew, make_skew, multiply_blocks
from sfumato.config.base import Options, option
from sfumato.data.batch import Tensors
from sfumato.errors import UserError
from sfumato.formats.adapter_keys import ALPHA
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

OFT_BLOCKS, RESCALE, MOST_PARTS = "oft_blocks", "rescale", 8
OFT_PARTS = tuple(f"{OFT_BLOCKS}.{i}" for i in range(MOST_PARTS))  # of sd-scripts for FLUX.1: blocks of each layer
SPELLINGS = {name: name for name in (OFT_BLOCKS, *OFT_PARTS, RESCALE)}


class DiagOftOptions(Options):
    """The arguments of Diag-OFT."""

    constraint: float = option(0.0, "limit of the norm of Q, times the number of rows; 0 for none", ge=0)
    rescaled: bool = option(False, "one more factor for each output")


@ADAPTERS.register("diag_oft")
class DiagOFT(Adapter):
    """Blocks along the rows of the stacked weight, or along those of each of its layers.

    What is rotated is the layer's output: no weight is formed, unless a block has rows of two layers. rank_dropout
    drops rows of the change, the same for the whole batch. alpha is the limit in files.
    """

    label = "Diag-OFT"
    reads_weights = True
    spellings = SPELLINGS
    options_class = DiagOftOptions
    dim_meaning = "the size of a block, or the number of blocks where that is smaller"
    uses_alpha = False
    takes_wrappers = False
    dropouts = frozenset({"rank", "module"})

    rescale: nn.Parameter | None

    def __init__(self, group: LayerGroup, tensors: Mapping[str, Tensor], *, alpha: float) -> None:
        """tensors: OFT_BLOCKS (blocks, size, size), or OFT_PARTS, one for each layer; RESCALE (rows, 1, ...)."""
        super().__init__(group)
        device = group.layers[0].weight.device
        self.alpha = float(torch.tensor(alpha))  # as files have it, so that a run goes on bitwise from its file
        self.is_divided = OFT_BLOCKS not in tensors
        names = list_block_names(tensors)
        self.blocks = nn.ParameterList([nn.Parameter(tensors[name].to(device)) for name in names])
        rescale = tensors.get(RESCALE)
        self.register_parameter(RESCALE, None if rescale is None else nn.Parameter(rescale.to(device)))

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        """Blocks of 0 and factors of 1."""
        options, weight = request.options, group.layers[0].weight
        assert isinstance(options, DiagOftOptions)
        tensors = {OFT_BLOCKS: torch.zeros(cls.choose_shape(group.num_rows, request.rank), device=weight.device)}
        if options.rescaled:
            tensors[RESCALE] = torch.ones(group.num_rows, *[1] * (weight.ndim - 1), device=weight.device)
        return cls(group, tensors, alpha=options.constraint)

    @staticmethod
    def choose_shape(rows: int, rank: int) -> tuple[int, ...]:
        """Of the blocks for this --network_dim."""
        size, count = factorize(rows, rank)
        return (count, size, size)

    @property
    def known_rank(self) -> int | None:
        """None: several sizes of blocks come from one --network_dim."""
        return None

    # ------------------------------------------------------------ the change

    def turn(self, values: Tensor, blocks: Tensor) -> Tensor:
        """The change of row vectors (..., rows) by `blocks`, which are R - I: those of these rows alone."""
        return multiply_blocks(values, blocks)

    def find_differences(self, i: int) -> Tensor:
        """R - I of all blocks, or of those of the i-th layer where each layer has its own."""
        blocks = self.blocks[i if self.is_divided else 0]
        skew = make_skew(blocks)
        if self.alpha:
            rows = len(self.group.layers[i].weight) if self.is_divided else self.group.num_rows
            skew = limit_skew(skew, self.alpha * rows)
        return find_rotation_difference(skew)

    def take_differences(self, i: int) -> Tensor | None:
        """R - I of the i-th layer's own blocks; None where a block has rows of another layer, too."""
        if self.is_divided:
            return self.find_differences(i)
        size = self.blocks[0].shape[-1]
        if any(start % size or stop % size for start, stop in self.group.rows[i]):
            return None
        differences = self.find_differences(i)
        if self.group.is_plain:
            return differences
        return torch.cat([differences[start // size : stop // size] for start, stop in self.group.rows[i]])

    def _change_values(self, values: Tensor, i: int, differences: Tensor) -> Tensor:
        """The change of the i-th layer's outputs (..., rows), or of its columns' rows."""
        change = self.turn(values, differences)
        if self.rescale is None:
            return change
        factors = self.group.take_rows(self.rescale, i).flatten().to(values.dtype)
        return factors * change + (factors - 1) * values

    def delta(self, i: int) -> Tensor:
        weight, differences = self.group.layers[i].weight, self.take_differences(i)
        if differences is None:
            return self._form_stacked(i)
        rows = weight.to(differences.dtype).flatten(1)
        return self._change_values(rows.t(), i, differences).t().reshape(weight.shape)

    def _form_stacked(self, i: int) -> Tensor:
        """The i-th layer's rows of the change of all layers together."""
        layers, group = self.group.layers, self.group
        differences = self.find_differences(i)
        stacked = group.stack_rows([layer.weight.to(differences.dtype).flatten(1) for layer in layers])
        change = self.turn(stacked.t(), differences).t()
        if self.rescale is not None:
            factors = self.rescale.flatten(1)
            change = factors * change + (factors - 1) * stacked
        return group.take_rows(change, i).reshape(layers[i].weight.shape)

    def forward(self, x: Tensor, i: int) -> Tensor:
        layer = self.group.layers[i]
        differences = self.take_differences(i)
        if differences is None:
            return drop_rows(self, apply_formed(layer, x, lambda: self._form_stacked(i)), i)
        return self._change_product(apply_weight(layer, x, layer.weight.to(x.dtype)), i, differences)

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        """The layer's own product is taken from its output, without a second one."""
        differences = self.take_differences(i)
        if differences is None:
            return super().add_to(output, x, i, strength)
        product = remove_bias(self.group.layers[i], output)
        return add_change(output, self._change_product(product, i, differences), strength)

    def _change_product(self, product: Tensor, i: int, differences: Tensor) -> Tensor:
        """The change of the layer's output; product: W x without bias."""
        if isinstance(self.group.layers[i], nn.Linear):
            return drop_rows(self, self._change_values(product, i, differences), i)
        change = self._change_values(product.movedim(1, -1), i, differences)
        return drop_rows(self, change.movedim(-1, 1), i)

    # ------------------------------------------------------------ files

    def export_tensors(self) -> Tensors:
        names = OFT_PARTS[: len(self.blocks)] if self.is_divided else (OFT_BLOCKS,)
        tensors: Tensors = dict(zip(names, self.blocks, strict=True))
        if self.rescale is not None:
            tensors[RESCALE] = self.rescale
        return {**tensors, ALPHA: torch.tensor(float(self.alpha))}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        own = {name: tensors[name].float() for name in SPELLINGS if name in tensors}
        if RESCALE in own:
            own[RESCALE] = own[RESCALE].reshape(-1, *[1] * (group.layers[0].weight.ndim - 1))
        check_parts(group, own)
        return cls(group, own, alpha=float(tensors[ALPHA]))

    @classmethod
    def owns(cls, tensors: Mapping[str, Tensor]) -> bool:
        return not any(tensors[name].ndim == 4 for name in (OFT_BLOCKS, *OFT_PARTS) if name in tensors)

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        """The blocks, factors where there are any, and alpha; 0 where nothing says it."""
        names = list_block_names(layer.tensors)
        layer.check_complete(names)
        for name in names:
            blocks = layer.tensors[name]
            if blocks.ndim < 3 or 0 in blocks.shape or blocks.shape[-1] != blocks.shape[-2]:
                raise layer.make_mismatch_error(name, name)
        tensors = {name: layer.tensors[name] for name in (*names, RESCALE) if name in layer.tensors}
        if RESCALE in tensors and tensors[RESCALE].numel() != count_rows(tensors):
            raise layer.make_mismatch_error(names[0], RESCALE)
        return {**tensors, ALPHA: torch.tensor(layer.find_alpha(0))}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (count_rows(tensors), 0)


def list_block_names(tensors: Mapping[str, Tensor]) -> Sequence[str]:
    """The names of the tensors with blocks; the first name where there are none."""
    parts = [name for name in OFT_PARTS if name in tensors]
    return OFT_PARTS[: len(parts)] if parts and OFT_BLOCKS not in tensors else (OFT_BLOCKS,)


def count_rows(tensors: Mapping[str, Tensor]) -> int:
    """The rows of the weight that the blocks rotate."""
    return sum(tensors[name].shape[-3] * tensors[name].shape[-1] for name in list_block_names(tensors))


def check_parts(group: LayerGroup, tensors: Mapping[str, Tensor]) -> None:
    """UserError where blocks of each layer are not those of the group's layers."""
    if OFT_BLOCKS in tensors:
        return
    sizes = [tensors[name].shape[-3] * tensors[name].shape[-1] for name in list_block_names(tensors)]
    if sizes != [len(layer.weight) for layer in group.layers]:
        raise UserError(
            f"{group.name} has layers of {', '.join(str(len(layer.weight)) for layer in group.layers)} rows, the file "
            f"has blocks for {', '.join(map(str, sizes))}",
            code="oft-parts-of-other-layers",
        )
