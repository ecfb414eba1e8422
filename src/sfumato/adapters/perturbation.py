"""GGPO (Chang et al. 2025, "LoRA-GGPO"): random perturbations of adapted weights while they train.

Each row of a layer's weight gets noise of its own strength (sigma |W_i + D_i| + beta |G_i|^2) / sqrt(rows), where D is
the adapter's change and G the gradient of the last step. The gradient does not flow through the perturbation, which is
in no file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sfumato.formats.groups import Layer, LayerGroup


class Perturbation(nn.Module):
    """The strengths of one layer group's rows; part of a saved state, since they depend on the last gradient."""

    strengths: Tensor  # (rows of the group,), float32
    weight_squares: Tensor  # (rows of the group,): the squared lengths of the weights' rows

    def __init__(self, group: LayerGroup, *, sigma: float, beta: float) -> None:
        """Until the first gradient is known, it counts as 0."""
        super().__init__()
        self.sigma, self.beta = sigma, beta
        with torch.no_grad():
            squares = group.stack_rows([_measure_rows(layer) for layer in group.layers])
        self.register_buffer("weight_squares", squares, persistent=False)
        self.register_buffer("strengths", self._find_strengths(squares, torch.zeros_like(squares)))

    @torch.no_grad()
    def update(self, change_squares: Tensor, gradient_squares: Tensor) -> tuple[Tensor, Tensor]:
        """Take over the squared lengths of the rows, each (rows,); the mean lengths of gradient and weight, 0-d.

        A gradient that is not finite changes nothing.
        """
        weight_squares = self.weight_squares + change_squares
        strengths = self._find_strengths(weight_squares, gradient_squares)
        self.strengths.copy_(strengths.where(strengths.isfinite().all(), self.strengths))
        return gradient_squares.sqrt().mean(), weight_squares.sqrt().mean()

    def _find_strengths(self, weight_squares: Tensor, gradient_squares: Tensor) -> Tensor:
        strengths = self.sigma * weight_squares.sqrt() + self.beta * gradient_squares
        return strengths / math.sqrt(len(strengths))

    @torch.no_grad()
    def draw(self, group: LayerGroup, i: int, like: Tensor) -> Tensor:
        """A perturbation of the i-th layer's weight, from torch's global generators, which checkpointing replays.

        like: gives dtype and device.
        """
        shape = group.layers[i].weight.shape
        strengths = group.take_rows(self.strengths, i).to(like)
        noise = torch.randn(shape, dtype=like.dtype, device=like.device)
        return noise.mul_(strengths.reshape(-1, *[1] * (len(shape) - 1)))


def _measure_rows(layer: Layer) -> Tensor:
    """(rows,) the squared lengths of a weight's rows, float32."""
    return layer.weight.float().flatten(1).square().sum(1)
