"""LoRA (Hu et al. 2021, eq. 3): W + alpha / rank * up @ down, for linear layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.adapters.base import Adapter, expect_suffixes
from sfumato.errors import UserError
from sfumato.formats.groups import LayerGroup

SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")


class LoRA(Adapter):
    """One shared down matrix for the whole group; the rows of up are sliced over its layers."""

    boosted = ("lora_up",)

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
        self.lora_up = nn.Parameter(torch.zeros(group.height, rank, *[1] * len(kernel), device=device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def _up(self, i: int) -> Tensor:
        return self.lora_up if len(self.group.layers) == 1 else self.group.take(self.lora_up, i)

    def delta(self, i: int) -> Tensor:
        product = self._up(i).flatten(1) @ self.lora_down.flatten(1)
        return self.scale * product.reshape(self.group.layers[i].weight.shape)

    def forward(self, x: Tensor, i: int) -> Tensor:
        """The scale goes onto the rank-wide product: the full-size tensors are touched once."""
        layer = self.group.layers[i]
        down, up = self.lora_down.to(x.dtype), self._up(i).to(x.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, down) * self.scale, up)
        low = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore
        return F.conv2d(low * self.scale, up)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "lora_down.weight": self.lora_down,
            "lora_up.weight": self.lora_up,
            "alpha": torch.tensor(float(self.alpha)),
        }

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor]) -> Self:
        """alpha is optional in files of other programs and then means the rank."""
        expect_suffixes(group, tensors, SUFFIXES)
        missing = [suffix for suffix in SUFFIXES[:2] if suffix not in tensors]
        if missing:
            raise UserError(f"{group.name} lacks {' and '.join(missing)}")
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = down.shape[0]
        alpha = float(tensors["alpha"]) if "alpha" in tensors else float(rank)
        adapter = cls(group, rank=rank, alpha=alpha)
        for name, parameter, value in (("down", adapter.lora_down, down), ("up", adapter.lora_up, up)):
            if parameter.numel() != value.numel() or parameter.shape[:2] != value.shape[:2]:
                raise UserError(
                    f"{group.name}.lora_{name}.weight has shape {tuple(value.shape)}, "
                    f"{tuple(parameter.shape)} is expected: the file was made for another model"
                )
            with torch.no_grad():
                parameter.copy_(value.reshape(parameter.shape))
        return adapter
