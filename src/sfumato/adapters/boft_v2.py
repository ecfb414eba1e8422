"""BOFT (Liu et al. 2024, eq. 4) as PEFT and sd-scripts have it: inputs rotated in a butterfly's stages, outputs scaled.

The weight is s W (R_m ... R_1)ᵀ. Each R is P B Pᵀ: blocks of R = (I - Q) (I + Q)⁻¹, Q = (A - Aᵀ) / 2, between a
permutation and its inverse. Columns of a convolution are those of the flattened weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, apply_weight, drop_module, over_channels
from sfumato.adapters.formed_change import apply_formed
from sfumato.adapters.oft_v2 import count_columns
from sfumato.adapters.rotations import find_rotation_difference, make_skew, multiply_blocks
from sfumato.common.text import plural
from sfumato.config.base import Options, option
from sfumato.data.batch import Tensors
from sfumato.errors import UserError
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

BUTTERFLY, FACTORS = "boft_R", "boft_s"
SPELLINGS = {f"{name}{end}": name for name in (BUTTERFLY, FACTORS) for end in ("", ".default")}


class BoftV2Options(Options):
    """The arguments of PEFT's BOFT."""

    boft_n_butterfly_factor: int = option(1, "the number of stages", ge=1)
    block_num: int = option(0, "the number of blocks, in the place of their size", ge=0)
    auto_adjust: bool = option(True, "take the nearest possible size of blocks where --network_dim is none")


@ADAPTERS.register("boft_v2")
class BOFTv2(Adapter):
    """One rotation of the input for all layers of a group.

    Dropout leaves single blocks unrotated, for the whole batch.
    """

    label = "BOFT of PEFT"
    reads_weights = True
    spellings = SPELLINGS
    options_class = BoftV2Options
    dim_meaning = "the size of a block"
    dim_arguments = ("block_size", "boft_block_size")
    uses_alpha = False
    takes_wrappers = False
    dropouts = frozenset({"neuron", "module"})
    alpha = 1.0

    orders: Tensor  # (stages, columns)

    def __init__(self, group: LayerGroup, blocks: Tensor, factors: Tensor) -> None:
        """blocks: (stages, blocks, size, size). factors: (rows of the group, 1)."""
        super().__init__(group)
        device = group.layers[0].weight.device
        self.boft_R, self.boft_s = nn.Parameter(blocks.to(device)), nn.Parameter(factors.to(device))
        stages, count, size, _ = blocks.shape
        orders = [make_butterfly_order(count, size, stage, stages).to(device) for stage in range(stages)]
        self.register_buffer("orders", torch.stack(orders), persistent=False)

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        """Blocks of 0 and factors of 1."""
        size = choose_size(count_columns(group), request.rank, request.options)
        assert isinstance(request.options, BoftV2Options)
        assert size is not None, "which `allows_dim` has checked"
        shape = (request.options.boft_n_butterfly_factor, count_columns(group) // size, size, size)
        device = group.layers[0].weight.device
        return cls(group, torch.zeros(shape, device=device), torch.ones(group.num_rows, 1, device=device))

    @classmethod
    def allows_dim(cls, group: LayerGroup, dim: int, options: Options) -> bool:
        return choose_size(count_columns(group), dim, options) is not None

    @property
    def known_rank(self) -> int | None:
        """None: the size of a block may have been adjusted."""
        return None

    # ------------------------------------------------------------ the change

    def find_differences(self) -> Tensor:
        """R - I of every block (stages, blocks, size, size)."""
        differences = find_rotation_difference(make_skew(self.boft_R) / -2)
        dropout = self.dropout.neuron
        if dropout and self.training:
            kept = torch.rand(*differences.shape[:2], 1, 1, device=differences.device) >= dropout
            differences = differences * kept.to(differences.dtype)
        return differences

    def turn(self, values: Tensor, differences: Tensor) -> Tensor:
        """The change of row vectors (..., columns) by all stages, the last one first."""
        change = values.new_zeros(())
        for order, blocks in reversed(list(zip(self.orders, differences, strict=True))):
            turned = multiply_blocks((values + change)[..., order.argsort()], blocks)
            change = change + turned[..., order]
        return change

    def _take_factors(self, i: int) -> Tensor:
        return self.group.take_rows(self.boft_s, i).flatten()

    def delta(self, i: int) -> Tensor:
        """s W R - W, with R for the transposed product of all stages."""
        weight, differences = self.group.layers[i].weight, self.find_differences()
        rows, factors = weight.to(differences.dtype).flatten(1), self._take_factors(i).reshape(-1, 1)
        change = self.turn_weight(rows, differences)
        return (factors * change + (factors - 1) * rows).reshape(weight.shape)

    def turn_weight(self, rows: Tensor, differences: Tensor) -> Tensor:
        """The change of a weight's rows (rows, columns)."""
        change = rows.new_zeros(())
        for order, blocks in zip(self.orders, differences.transpose(2, 3), strict=True):
            turned = multiply_blocks((rows + change)[..., order.argsort()], blocks)
            change = change + turned[..., order]
        return change

    def forward(self, x: Tensor, i: int) -> Tensor:
        """Of linear layers the input is turned; no weight is formed."""
        layer = self.group.layers[i]
        if isinstance(layer, nn.Linear):
            weight, factors = layer.weight.to(x.dtype), over_channels(layer, self._take_factors(i)).to(x.dtype)
            turned = apply_weight(layer, self.turn(x, self.find_differences()), weight)
            change = factors * turned + (factors - 1) * apply_weight(layer, x, weight)
        else:
            change = apply_formed(layer, x, lambda: self.delta(i))
        module = self.dropout.module
        return drop_module(change, module) if module and self.training else change

    # ------------------------------------------------------------ files

    def export_tensors(self) -> Tensors:
        return {BUTTERFLY: self.boft_R, FACTORS: self.boft_s}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        blocks, factors = tensors[BUTTERFLY].float(), tensors[FACTORS].float().reshape(-1, 1)
        if blocks.shape[1] * blocks.shape[2] != count_columns(group):
            raise UserError(
                f"{group.name} has {plural(count_columns(group), 'input')}, the file has "
                f"{plural(blocks.shape[1], 'block')} of "
                f"{blocks.shape[2]} for them",
                code="boft-blocks-of-other-layer",
            )
        return cls(group, blocks, factors)

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        layer.check_complete((BUTTERFLY, FACTORS))
        blocks = layer.tensors[BUTTERFLY]
        if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3] or not is_butterfly(*blocks.shape[:3]):
            raise layer.make_mismatch_error(BUTTERFLY, FACTORS)
        return {name: layer.tensors[name] for name in (BUTTERFLY, FACTORS)}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        _, count, size, _ = tensors[BUTTERFLY].shape
        return (tensors[FACTORS].numel(), count * size)


def is_butterfly(stages: int, count: int, size: int) -> bool:
    """Whether so many stages can mix so many blocks."""
    return stages == 1 or (size % 2 == 0 and count % 2 ** (stages - 1) == 0)


def choose_size(columns: int, dim: int, options: Options) -> int | None:
    """The size of a block for this --network_dim; None where there is none."""
    assert isinstance(options, BoftV2Options)
    sizes = [size for size in range(2, columns + 1) if columns % size == 0]
    sizes = [size for size in sizes if is_butterfly(options.boft_n_butterfly_factor, columns // size, size)]
    if options.block_num:
        sizes = [size for size in sizes if columns == size * options.block_num]
    elif not options.auto_adjust:
        sizes = [size for size in sizes if size == dim]
    return min(sizes, key=lambda size: (abs(size - dim), size), default=None)


def make_butterfly_order(count: int, size: int, stage: int, stages: int) -> Tensor:
    """Where each column of a stage comes from: in runs of half a block the even ones before the odd ones (columns,).

    The runs are sorted within count / 2^stage equal pieces of the columns. One stage alone changes no order.
    """
    columns = torch.arange(count * size)
    if stages == 1:
        return columns
    runs = columns.reshape(max(count // 2**stage, 1), -1, 2, size // 2)
    return runs.transpose(1, 2).flatten()
