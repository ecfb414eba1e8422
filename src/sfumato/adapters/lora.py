"""LoRA (Hu et al. 2021, eq. 3): W + alpha / rank * up @ down, for linear layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, drop_module, per_row
from sfumato.adapters.frozen_linear import add_low_rank, can_fuse
from sfumato.adapters.lora_files import (
    DOWN,
    MIDDLE,
    SPELLINGS,
    UP,
    complete_matrices,
    find_factors,
    find_product_shape,
    join_matrices,
    name_for_peft,
)
from sfumato.formats.groups import LayerGroup


@ADAPTERS.register("lora")
class LoRA(Adapter):
    """One shared down matrix for the whole group; the rows of up are sliced over its layers.

    Dropout between the matrices makes what is left larger by 1 / (1 - p), and so does that of ranks, which drops each
    rank for each row of the batch.
    """

    label = "LoRA"
    spellings = SPELLINGS
    plus_params = ("lora_up",)
    linear_tensors = (UP,)
    has_norm_limit = True
    has_perturbation = True
    dropouts = frozenset({"neuron", "rank", "module"})

    def __init__(self, group: LayerGroup, *, rank: int, alpha: float, generator: Generator | None = None) -> None:
        super().__init__(group)
        layer = group.layers[0]
        device = layer.weight.device
        kernel = tuple(layer.weight.shape[2:])
        self.rank, self.alpha = rank, alpha
        down = torch.empty(rank, layer.weight.shape[1], *kernel, device="meta" if device.type == "meta" else "cpu")
        if generator is not None and device.type != "meta":
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.lora_down = nn.Parameter(down.to(device))
        self.lora_up = nn.Parameter(torch.zeros(group.num_rows, rank, *[1] * len(kernel), device=device))

    @property
    def known_rank(self) -> int:
        return self.rank

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        return cls(group, rank=request.rank, alpha=request.alpha, generator=request.generator)

    @classmethod
    def find_rank_limit(cls, group: LayerGroup) -> int:
        """The rank that the group's weight has at most: the smaller of its rows and columns."""
        return min(group.num_rows, math.prod(group.layers[0].weight.shape[1:]))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def take_matrices(self, i: int) -> tuple[Tensor, Tensor]:
        """The down matrix and the i-th layer's rows of the up matrix."""
        return self.lora_down, self.lora_up if self.group.is_plain else self.group.take_rows(self.lora_up, i)

    def delta(self, i: int) -> Tensor:
        down, up = self.take_matrices(i)
        product = up.flatten(1) @ down.flatten(1)
        return self.scale * product.reshape(self.group.layers[i].weight.shape)

    def forward(self, x: Tensor, i: int) -> Tensor:
        """The scale is applied to the rank-wide product: the full-size tensor is written once."""
        down, up = self.take_matrices(i)
        low = self._project_down(x, down, i) * self.scale
        up = up.to(low.dtype)
        return F.linear(low, up) if isinstance(self.group.layers[i], nn.Linear) else F.conv2d(low, up)

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        """For linear layers the matrix product adds to the output itself, without a full-size tensor for the change."""
        layer = self.group.layers[i]
        if not isinstance(layer, nn.Linear):
            return super().add_to(output, x, i, strength)
        is_per_row = isinstance(strength, Tensor)
        down, up = self.take_matrices(i)
        up = (up * (self.scale if is_per_row else self.scale * strength)).to(output.dtype)
        if not is_per_row and not self._uses_dropout and can_fuse(layer, x, output):
            return add_low_rank(output, x, layer.weight, down.to(x.dtype), up)
        low = self._project_down(x, down, i).to(output.dtype)
        if is_per_row:
            low = low * per_row(strength, low)
        # Not in place: the output of a linear layer may be a view, whose gradient autograd would copy.
        return torch.addmm(output.reshape(-1, len(up)), low.reshape(-1, self.rank), up.t()).view_as(output)

    @property
    def _uses_dropout(self) -> bool:
        return self.training and bool(self.dropout)

    def _project_down(self, x: Tensor, down: Tensor, i: int) -> Tensor:
        """down(x) with dropout: rank channels, last for linear layers, second for convolutions."""
        layer, down = self.group.layers[i], down.to(x.dtype)
        if isinstance(layer, nn.Linear):
            low, rank_shape = F.linear(x, down), [1] * (x.ndim - 2) + [self.rank]
        else:
            low = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore
            rank_shape = [self.rank, 1, 1]
        if not self._uses_dropout:
            return low
        dropout = self.dropout
        if dropout.neuron:
            low = F.dropout(low, dropout.neuron)
        if dropout.rank:
            mask = torch.rand(low.shape[0], *rank_shape, device=low.device) >= dropout.rank
            low = low * (mask.to(low.dtype) / (1 - dropout.rank))
        return drop_module(low, dropout.module) if dropout.module else low

    @torch.no_grad()
    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """Both matrices are scaled by the root of the ratio. |up down|^2 comes from two products of rank x rank."""
        up, down = self.lora_up.flatten(1), self.lora_down.flatten(1)
        square = ((up.t() @ up) * (down @ down.t())).sum()
        norm = self.scale * square.clamp(min=0).sqrt()
        ratio = (maximum / norm.clamp(min=maximum / 2)).clamp(max=1)
        self.lora_up.mul_(ratio.sqrt())
        self.lora_down.mul_(ratio.sqrt())
        return norm * ratio, ratio < 1

    @torch.no_grad()
    def measure_rows(self) -> tuple[Tensor, Tensor]:
        """From products of rank x rank: |up_i down|^2 = up_i (down down^T) up_i^T, and the same of the gradient.

        The gradient of up @ down is taken as up @ grad(down) + grad(up) @ down, as sd-scripts does.
        """
        up, down = (each.float().flatten(1) for each in (self.lora_up, self.lora_down))
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in (self.lora_up, self.lora_down)]
        up_grad, down_grad = (each.float().flatten(1) for each in grads)
        left = torch.cat([up, up_grad], dim=1)  # (rows, 2 rank) @ right (2 rank, columns) = the gradient
        right = torch.cat([down_grad, down])
        change = ((up @ (down @ down.t())) * up).sum(1)
        gradient = ((left @ (right @ right.t())) * left).sum(1).clamp(min=0)
        return self.scale**2 * change, self.scale**2 * gradient

    def export_tensors(self) -> dict[str, Tensor]:
        return {
            "lora_down.weight": self.lora_down,
            "lora_up.weight": self.lora_up,
            "alpha": torch.tensor(float(self.alpha)),
        }

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        down, up = tensors[DOWN], tensors[UP]
        adapter = cls(group, rank=len(down), alpha=float(tensors["alpha"]))
        with torch.no_grad():
            for parameter, value in ((adapter.lora_down, down), (adapter.lora_up, up)):
                parameter.copy_(value.reshape(parameter.shape))
        return adapter

    @classmethod
    def owns(cls, tensors: Mapping[str, Tensor]) -> bool:
        """With a third matrix they are another kind's."""
        return MIDDLE not in tensors

    complete = staticmethod(complete_matrices)
    find_weight_shape = staticmethod(find_product_shape)
    join = staticmethod(join_matrices)
    to_factors = staticmethod(find_factors)
    to_peft = staticmethod(name_for_peft)
