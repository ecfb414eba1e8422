"""Stable Diffusion 3's patch embedding: latents become tokens, and a table of positions is added."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sfumato.errors import UserError

_SPAN = 16.0  # positions over the side of the image that a scaled table is for
_MARGIN = 1.5  # side of a scaled table, in sides of its image


class SD3PatchEmbed(nn.Module):
    """diffusers' PatchEmbed of this model, with scaled tables of positions and random crops of them.

    While gradients are recorded, a share `crop_rate` of the images gets a random crop of the table instead of its
    middle, drawn from torch's global generator, like dropout.
    """

    pos_embed: Tensor  # (1, side * side, width)

    def __init__(self, proj: nn.Conv2d, *, size: int) -> None:
        super().__init__()
        self.proj = proj
        self.register_buffer("pos_embed", torch.empty(1, size**2, proj.out_channels, device="meta"))
        self.scaled_buffers: dict[int, str] = {}  # side of the image in patches -> buffer of its table
        self.crop_rate = 0.0

    def forward(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, tokens, width)."""
        tokens = self.proj(latent)
        height, width = tokens.shape[-2:]
        table = self.choose_table(height, width)
        count = len(tokens) if torch.is_grad_enabled() and self.crop_rate else 1
        positions = torch.stack([self.crop(table, height, width) for _ in range(count)])
        return (tokens.flatten(2).transpose(1, 2) + positions).to(tokens.dtype)

    def choose_table(self, height: int, width: int) -> Tensor:
        """(side, side, width): the scaled table nearest to the image's area, or the model's own.

        The model's own is also used for images that do not fit into the scaled one.
        """
        if self.scaled_buffers:
            scaled = self.get_buffer(self.scaled_buffers[find_nearest_side(self.scaled_buffers, height * width)])
            if max(height, width) <= len(scaled):
                return scaled
        side = math.isqrt(self.pos_embed.shape[1])
        return self.pos_embed.view(side, side, -1)

    def crop(self, table: Tensor, height: int, width: int) -> Tensor:
        """(tokens, width): the middle of the table, or sometimes a random crop in training.

        Raises UserError where the table is smaller than the image.
        """
        free = len(table) - height, len(table) - width
        if min(free) < 0:
            raise UserError(
                f"an image of {height} x {width} patches is larger than the model's table of positions, whose side is "
                f"{len(table)}",
                code="image-exceeds-position-table",
                fix="use a smaller resolution; a patch is 16 pixels wide",
            )
        top, left = free[0] // 2, free[1] // 2
        if torch.is_grad_enabled() and self.crop_rate and torch.rand(()) < self.crop_rate:
            top, left = (int(torch.randint(rest + 1, ())) for rest in free)
        return table[top : top + height, left : left + width].flatten(0, 1)

    def add_scaled_tables(self, sides: Iterable[int]) -> None:
        """Use tables for images of these sides, in patches, instead of the model's own."""
        for side in sides:
            self.scaled_buffers[side] = f"scaled_{side}"
            table = make_scaled_table(side, self.proj.out_channels).to(self.pos_embed)
            self.register_buffer(self.scaled_buffers[side], table, persistent=False)


def find_nearest_side(sides: Iterable[int], area: int) -> int:
    """The side whose square is nearest to the area; the smaller one where two are equally near."""
    return min(sorted(sides), key=lambda side: abs(side**2 - area))


def make_scaled_table(side: int, width: int) -> Tensor:
    """(S, S, width) with S = 1.5 `side`, whose middle `side` x `side` patches span the positions 0 to 16."""
    size = int(side * _MARGIN)
    positions = _SPAN * (torch.arange(size, dtype=torch.float64) - (size - side) / 2) / side
    waves = make_sinusoids(positions, width // 2)
    down, across = waves[:, None].expand(-1, size, -1), waves[None].expand(size, -1, -1)
    return torch.cat([across, down], dim=-1).float()


def make_sinusoids(positions: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): sines, then cosines, of frequencies from 1 towards 1 / 10000."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
