"""OFTv2 (Qiu et al. 2025, sec. 3): the inputs of a weight are rotated in blocks, W Rᵀ, as PEFT and sd-scripts have it.

A triangle of numbers is a block's Q. Of convolutions with a kernel the rows of R are the columns of the flattened
weight, and sd-scripts has R in the place of Rᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, apply_weight, drop_module
from sfumato.adapters.formed_change import apply_formed
from sfumato.adapters.rotations import find_neumann_difference, find_rotation_difference, multiply_blocks
from sfumato.common.text import plural
from sfumato.config.base import Options, option
from sfumato.data.batch import Tensors
from sfumato.errors import UserError
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

TRIANGLE, IS_EXACT = "oft_R.weight", "is_exact"
SPELLINGS = {TRIANGLE: TRIANGLE, "oft_R.default.weight": TRIANGLE}


class OftV2Options(Options):
    """The arguments of OFTv2."""

    block_share: bool = option(False, "one block for all inputs of a layer")
    auto_adjust: bool = option(True, "take the nearest possible size of blocks where --network_dim is none")
    coft: bool = option(False, "limit each block's Q")
    coft_eps: float = option(6e-5, "with coft: the limit of its norm, times the root of the number of blocks", gt=0)


@ADAPTERS.register("oft_v2")
class OFTv2(Adapter):
    """One rotation of the input for all layers of a group.

    Dropout leaves single blocks unrotated, for the whole batch.
    """

    label = "OFTv2"
    reads_weights = True
    spellings = SPELLINGS
    options_class = OftV2Options
    dim_meaning = "the size of a block"
    dim_arguments = ("block_size", "oft_block_size")
    uses_alpha = False
    takes_wrappers = False
    dropouts = frozenset({"neuron", "module"})
    alpha = 1.0
    limit: float | None = None

    def __init__(self, group: LayerGroup, triangles: Tensor, *, is_exact: bool = False) -> None:
        """triangles: (blocks or 1, size * (size - 1) / 2), the values above the diagonal of Q.

        is_exact: the inverse of Cayley's transform is no series, which PEFT has at wish.
        """
        super().__init__(group)
        self.is_exact = is_exact
        self.oft_R = nn.Parameter(triangles.to(group.layers[0].weight.device))
        self.size = find_triangle_size(triangles.shape[1])
        self.count = count_columns(group) // self.size

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        options = request.options
        assert isinstance(options, OftV2Options)
        size = adjust_size(count_columns(group), request.rank) if options.auto_adjust else request.rank
        count = 1 if options.block_share else count_columns(group) // size
        device = group.layers[0].weight.device
        return cls(group, torch.zeros(count, size * (size - 1) // 2, device=device))

    @classmethod
    def allows_dim(cls, group: LayerGroup, dim: int, options: Options) -> bool:
        assert isinstance(options, OftV2Options)
        return options.auto_adjust or count_columns(group) % dim == 0

    def configure(self, options: Options) -> None:
        assert isinstance(options, OftV2Options)
        self.limit = options.coft_eps if options.coft else None

    @property
    def known_rank(self) -> int | None:
        """None: the size of a block may have been adjusted."""
        return None

    # ------------------------------------------------------------ the change

    def limit_triangles(self) -> Tensor:
        """The numbers of Q with the limit of each block's norm; a triangle's norm is that of Q / sqrt(2)."""
        if self.limit is None:
            return self.oft_R
        norms = math.sqrt(2) * self.oft_R.norm(dim=1, keepdim=True)
        limit = self.limit / math.sqrt(len(self.oft_R))
        is_larger = norms > limit * (1 + 1e-6)  # so that what a file has is not limited again by its rounding
        return self.oft_R * torch.where(is_larger, limit / norms.clamp(min=limit), 1.0)

    def find_differences(self) -> Tensor:
        """R - I (blocks, size, size) in float32 at least."""
        triangles = self.limit_triangles()
        triangles = triangles.float() if triangles.dtype.itemsize < 4 else triangles
        upper = triangles.new_zeros(len(triangles), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=triangles.device)
        upper[:, rows, columns] = triangles
        skew = upper - upper.transpose(1, 2)
        difference = find_rotation_difference(-skew) if self.is_exact else find_neumann_difference(skew)
        dropout = self.dropout.neuron
        if dropout and self.training and len(difference) > 1:
            kept = torch.rand(len(difference), 1, 1, device=difference.device) >= dropout
            difference = difference * kept.to(difference.dtype)
        return difference.expand(self.count, -1, -1)

    def delta(self, i: int) -> Tensor:
        weight, differences = self.group.layers[i].weight, self.find_differences()
        differences = differences if weight.ndim == 4 else differences.transpose(1, 2)
        return multiply_blocks(weight.to(differences.dtype).flatten(1), differences).reshape(weight.shape)

    def forward(self, x: Tensor, i: int) -> Tensor:
        """W (x R - x) of linear layers, whose weight is not formed."""
        layer = self.group.layers[i]
        if isinstance(layer, nn.Linear):
            change = apply_weight(layer, multiply_blocks(x, self.find_differences()), layer.weight.to(x.dtype))
        else:
            change = apply_formed(layer, x, lambda: self.delta(i))
        module = self.dropout.module
        return drop_module(change, module) if module and self.training else change

    # ------------------------------------------------------------ files

    def export_tensors(self) -> Tensors:
        return {TRIANGLE: self.limit_triangles()}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        triangles = tensors[TRIANGLE].float()
        size, columns = find_triangle_size(triangles.shape[1]), count_columns(group)
        if columns % size or len(triangles) not in (1, columns // size):
            raise UserError(
                f"{group.name} has {plural(columns, 'input')}, the file has {plural(len(triangles), 'block')} of "
                f"{size} for them",
                code="oft-blocks-of-other-layer",
            )
        return cls(group, triangles, is_exact=bool(tensors[IS_EXACT]))

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        layer.check_complete((TRIANGLE,))
        triangles = layer.tensors[TRIANGLE]
        if triangles.ndim != 2 or not find_triangle_size(triangles.shape[1]):
            raise layer.make_mismatch_error(TRIANGLE, TRIANGLE)
        is_exact = layer.config is not None and layer.config.is_exact_rotation
        return {TRIANGLE: triangles, IS_EXACT: torch.tensor(int(is_exact))}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Of one shared block nothing is known but its size."""
        count, size = len(tensors[TRIANGLE]), find_triangle_size(tensors[TRIANGLE].shape[1])
        return (0, count * size if count > 1 else 0)


def count_columns(group: LayerGroup) -> int:
    """The inputs of the group's weights, with the kernel's elements."""
    return group.layers[0].weight[0].numel()


def find_triangle_size(count: int) -> int:
    """n of n (n - 1) / 2 numbers; 0 for any other count."""
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    return size if size * (size - 1) // 2 == count and count else 0


def adjust_size(columns: int, size: int) -> int:
    """The divisor of the columns nearest to `size`, of two the smaller one, from 2 on."""
    divisors = [each for each in range(2, columns + 1) if columns % each == 0]
    return min(divisors, key=lambda each: (abs(each - size), each))
