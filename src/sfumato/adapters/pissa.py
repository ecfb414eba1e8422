"""PiSSA (Meng et al. 2024, eq. 2 to 4): LoRA whose matrices start as the largest singular parts of the weight.

The paper trains W - B₀ A₀ + B A. Here the weight stays as it is, and A - A₀ and B - B₀ train from 0 on: the same
change, which is no difference of large values. In files it is a LoRA of twice the rank, for the weights as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, drop_module
from sfumato.adapters.lora_files import DOWN, UP, complete_matrices, find_product_shape, join_matrices, name_for_peft
from sfumato.config.base import Options, option
from sfumato.data.batch import Tensors
from sfumato.errors import UserError
from sfumato.formats.adapter_keys import ALPHA
from sfumato.formats.groups import LayerGroup

SPELLINGS: dict[str, str] = {}
ITERATIONS, MORE_RANKS = 4, 8  # of the search for singular values (Halko et al. 2011, alg. 4.4)


class PissaOptions(Options):
    """The argument of PiSSA."""

    pissa: bool = option(
        False, "PiSSA: start from the largest singular parts of the weights, which come in their place"
    )


@ADAPTERS.register("pissa")
class PiSSA(Adapter):
    """The change is (B - B₀) A₀ + B (A - A₀). Weight decay pulls both matrices to where they start."""

    label = "PiSSA"
    spellings = SPELLINGS
    replaces = "lora"
    files_of = "lora"
    options_class = PissaOptions
    starts_from_weights = True
    plus_params = ("up_change",)
    dropouts = frozenset({"module"})
    linear_tensors = (UP,)

    start_down: Tensor
    start_up: Tensor

    def __init__(self, group: LayerGroup, start_down: Tensor, start_up: Tensor, *, alpha: float) -> None:
        """A₀ (rank, columns with the kernel) and B₀ (rows of the group, rank)."""
        super().__init__(group)
        device = group.layers[0].weight.device
        self.alpha = alpha
        self.register_buffer("start_down", start_down.to(device))
        self.register_buffer("start_up", start_up.to(device))
        self.down_change = nn.Parameter(torch.zeros_like(self.start_down))
        self.up_change = nn.Parameter(torch.zeros_like(self.start_up))

    @classmethod
    def is_wanted(cls, options: Options, group: LayerGroup | None) -> bool:
        assert isinstance(options, PissaOptions)
        return options.pissa

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        weight, rank = group.layers[0].weight, request.rank
        if weight.is_meta or request.generator is None:
            columns = weight[0].numel()
            down = torch.zeros(rank, columns, device=weight.device)
            up = torch.zeros(group.num_rows, rank, device=weight.device)
        else:
            stacked = group.stack_rows([layer.weight.detach().float().flatten(1) for layer in group.layers])
            up, down = find_largest_parts(stacked, rank, request.alpha / rank, request.generator)
        return cls(group, down, up, alpha=request.alpha)

    @classmethod
    def find_rank_limit(cls, group: LayerGroup) -> int:
        """The rank that the group's weight has at most."""
        return min(group.num_rows, group.layers[0].weight[0].numel())

    @property
    def known_rank(self) -> int:
        return len(self.start_down)

    @property
    def scale(self) -> float:
        return self.alpha / len(self.start_down)

    def join_parts(self) -> tuple[Tensor, Tensor]:
        """The two matrices of the change: (2 rank, columns) and (rows of the group, 2 rank)."""
        down = torch.cat([self.start_down, self.down_change])
        return down, torch.cat([self.up_change, self.start_up + self.up_change], 1)

    def delta(self, i: int) -> Tensor:
        down, up = self.join_parts()
        return self.scale * (self.group.take_rows(up, i) @ down).reshape(self.group.layers[i].weight.shape)

    def forward(self, x: Tensor, i: int) -> Tensor:
        layer, (down, up) = self.group.layers[i], self.join_parts()
        down, up = (down * self.scale).to(x.dtype), self.group.take_rows(up, i).to(x.dtype)
        if isinstance(layer, nn.Linear):
            change = F.linear(F.linear(x, down), up)
        else:
            kernel = down.reshape(-1, *layer.weight.shape[1:])
            low = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore
            change = F.conv2d(low, up[..., None, None])
        module = self.dropout.module
        return drop_module(change, module) if module and self.training else change

    # ------------------------------------------------------------ files

    def export_tensors(self) -> Tensors:
        """Twice the rank, and twice the alpha."""
        kernel = self.group.layers[0].weight.shape[1:]
        down, up = self.join_parts()
        up = up.reshape(*up.shape, *[1] * (len(kernel) - 1))
        return {DOWN: down.reshape(-1, *kernel), UP: up, ALPHA: torch.tensor(2 * float(self.alpha))}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        down, up = tensors[DOWN].float().flatten(1), tensors[UP].float().flatten(1)
        if len(down) % 2:
            raise UserError(
                f"{group.name} has a LoRA of rank {len(down)} in the file, one of PiSSA is even there",
                code="pissa-odd-rank",
                fix="remove --network_args pissa",
            )
        (start_down, down_change), (up_change, changed_up) = down.chunk(2), up.chunk(2, 1)
        adapter = cls(group, start_down.clone(), changed_up - up_change, alpha=float(tensors[ALPHA]) / 2)
        with torch.no_grad():
            adapter.down_change.copy_(down_change)
            adapter.up_change.copy_(up_change)
        return adapter

    complete = staticmethod(complete_matrices)
    find_weight_shape = staticmethod(find_product_shape)
    join = staticmethod(join_matrices)
    to_peft = staticmethod(name_for_peft)


def find_largest_parts(weight: Tensor, rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """up (rows, rank) and down (rank, columns): scale * up @ down is the weight's part of the largest singular values.

    The search starts from drawn directions; torch's global generators stay as they are.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(rank + MORE_RANKS, *weight.shape), niter=ITERATIONS)
    roots = (s[:rank] / scale).sqrt()
    return u[:, :rank] * roots, (v[:, :rank] * roots).t().contiguous()
