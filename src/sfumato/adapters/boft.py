"""BOFT (Liu et al. 2024, eq. 4), as LyCORIS has it: the outputs of a weight are rotated in the stages of a butterfly.

Every stage rotates blocks of rows that lie twice as far apart as in the one before: small blocks mix all rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sfumato.adapters.base import ADAPTERS
from sfumato.adapters.diag_oft import OFT_BLOCKS, RESCALE, DiagOFT
from sfumato.adapters.rotations import mix_butterfly
from sfumato.common.text import plural
from sfumato.config.base import Options
from sfumato.errors import InternalError
from sfumato.formats.groups import LayerGroup

SPELLINGS = {name: name for name in (OFT_BLOCKS, RESCALE)}


@ADAPTERS.register("boft")
class BOFT(DiagOFT):
    """Its blocks have one dimension more, (stages, blocks, size, size), in the same tensor of files.

    The stages mix all rows: in a fused layer the weights of all its layers are formed for each of them.
    """

    label = "BOFT"
    reads_weights = True
    spellings = SPELLINGS
    dim_meaning = "the largest size of a block; the rows divided by the size are a power of two"

    @staticmethod
    def choose_shape(rows: int, rank: int) -> tuple[int, ...]:
        size = find_block_size(rows, rank)
        if size is None:
            raise InternalError(f"{plural(rows, 'row has', 'rows have')} no butterfly of blocks up to {rank}")
        count = rows // size
        return (count.bit_length(), count, size, size)

    @classmethod
    def allows_dim(cls, group: LayerGroup, dim: int, options: Options) -> bool:
        return find_block_size(group.num_rows, dim) is not None

    def turn(self, values: Tensor, blocks: Tensor) -> Tensor:
        change = values.new_zeros(())
        for stage, own in enumerate(blocks):
            change = change + mix_butterfly(values + change, own, stage)
        return change

    def take_differences(self, i: int) -> Tensor | None:
        return self.find_differences(i) if self.group.is_plain else None

    @classmethod
    def owns(cls, tensors: Mapping[str, Tensor]) -> bool:
        return OFT_BLOCKS in tensors and tensors[OFT_BLOCKS].ndim == 4


def find_block_size(rows: int, largest: int) -> int | None:
    """The largest even size up to `largest` that divides the rows into a power of two; None where there is none."""
    for size in range(largest - largest % 2, 0, -2):
        count, rest = divmod(rows, size)
        if not rest and count & (count - 1) == 0:
            return size
    return None
