"""DyLoRA (Valipour et al. 2023, eq. 4 to 7): LoRA whose first ranks are useful without the others.

In each step every layer uses its first b ranks alone, a random number of them, and the last `unit` of these train. The
ranks of the file are sorted by importance: a smaller LoRA is cut out of it without training again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.adapters.base import ADAPTERS
from sfumato.adapters.lora import LoRA
from sfumato.config.base import Options, option
from sfumato.formats.groups import LayerGroup

SPELLINGS: dict[str, str] = {}


class DyloraOptions(Options):
    """The arguments of DyLoRA."""

    unit: int = option(1, "how many ranks train in a step; it divides --network_dim", ge=1)


@ADAPTERS.register("dylora")
class DyLoRA(LoRA):
    """Outside of training, and in files, it is a LoRA of all its ranks.

    The change of the first b ranks is scaled by sqrt(rank / b) more, as in sd-scripts, so that its size depends less on
    b. Ranks that do not train in a step have a gradient of 0.
    """

    label = "DyLoRA"
    spellings = SPELLINGS  # files of it are LoRA's
    files_of = "lora"
    options_class = DyloraOptions
    dim_meaning = "the largest rank, a multiple of unit"
    takes_wrappers = False
    has_perturbation = False
    dropouts = frozenset({"module"})
    unit = 1

    def configure(self, options: Options) -> None:
        assert isinstance(options, DyloraOptions)
        self.unit = options.unit

    @classmethod
    def allows_dim(cls, group: LayerGroup, dim: int, options: Options) -> bool:
        assert isinstance(options, DyloraOptions)
        return dim % options.unit == 0

    def take_matrices(self, i: int) -> tuple[Tensor, Tensor]:
        """In training those of a random number of ranks, drawn on the device: nothing waits for it."""
        down, up = super().take_matrices(i)
        if not self.training or not self.lora_up.requires_grad:
            return down, up
        units = torch.arange(self.rank, device=down.device) // self.unit
        last = (torch.rand((), device=down.device) * (self.rank // self.unit)).floor()
        trains, used = (units == last).to(up.dtype), (units <= last).to(up.dtype)
        factors = used * torch.sqrt(self.rank / ((last + 1) * self.unit))
        return _let_train(down, _along(trains, down, 0)), _let_train(up, _along(trains, up, 1)) * _along(factors, up, 1)


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """(ranks,) -> the shape in which they are multiplied with a matrix whose ranks lie along `dim`."""
    return values.reshape([-1 if d == dim else 1 for d in range(like.ndim)])


def _let_train(matrix: Tensor, trains: Tensor) -> Tensor:
    """The same values; the gradient is 0 where `trains` is 0."""
    return matrix * trains + matrix.detach() * (1 - trains)
