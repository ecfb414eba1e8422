"""Stable Diffusion 3's first layer: pixels of the latent become tokens, and a table tells each token its place."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sfumato.errors import UserError

SPAN = 16.0  # positions over the side of a picture of the size that a scaled table is made for
MARGIN = 1.5  # side of a scaled table over that of its picture


class Patches(nn.Module):
    """diffusers' PatchEmbed of this model, with a choice of tables and of the place that is cut out of them.

    While gradients are recorded, `crop_rate` of the pictures get a random place of the table instead of its middle.
    The draws are those of torch's global generator, as dropout's.
    """

    pos_embed: Tensor  # (1, side * side, width)

    def __init__(self, proj: nn.Conv2d, *, size: int) -> None:
        super().__init__()
        self.proj = proj
        self.register_buffer("pos_embed", torch.empty(1, size**2, proj.out_channels, device="meta"))
        self.scaled: dict[int, str] = {}  # side of the picture in patches -> the buffer with the table made for it
        self.crop_rate = 0.0

    def forward(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, tokens, width)."""
        tokens = self.proj(latent)
        height, width = tokens.shape[-2:]
        table = self.table(height, width)
        count = len(tokens) if torch.is_grad_enabled() and self.crop_rate else 1
        places = torch.stack([self.cut(table, height, width) for _ in range(count)])
        return (tokens.flatten(2).transpose(1, 2) + places).to(tokens.dtype)

    def table(self, height: int, width: int) -> Tensor:
        """(side, side, width) of the model's own table, or of the scaled one that is nearest to the picture's area.

        A picture that the scaled one cannot hold is told its places by the model's own.
        """
        if self.scaled:
            chosen = self.get_buffer(self.scaled[nearest(self.scaled, height * width)])
            if max(height, width) <= len(chosen):
                return chosen
        side = math.isqrt(self.pos_embed.shape[1])
        return self.pos_embed.view(side, side, -1)

    def cut(self, table: Tensor, height: int, width: int) -> Tensor:
        """(tokens, width): the middle of the table, or now and then, in training, any other part of it."""
        free = len(table) - height, len(table) - width
        if min(free) < 0:
            raise UserError(
                f"a picture of {height} x {width} patches is larger than the model's table of positions, whose side is "
                f"{len(table)}",
                fix="make the resolution smaller; a patch is 16 pixels wide",
            )
        top, left = (each // 2 for each in free)
        if torch.is_grad_enabled() and self.crop_rate and torch.rand(()) < self.crop_rate:
            top, left = (int(torch.randint(each + 1, ())) for each in free)
        return table[top : top + height, left : left + width].flatten(0, 1)

    def scale_to(self, sides: Iterable[int]) -> None:
        """Use tables made for pictures of these sides, in patches, instead of the model's own."""
        for side in sides:
            self.scaled[side] = f"scaled_{side}"
            table = scaled_table(side, self.proj.out_channels).to(self.pos_embed)
            self.register_buffer(self.scaled[side], table, persistent=False)


def nearest(sides: Iterable[int], area: int) -> int:
    """The side whose square is nearest to the area; between two squares the middle belongs to the smaller one."""
    return min(sorted(sides), key=lambda side: abs(side**2 - area))


def scaled_table(side: int, width: int) -> Tensor:
    """(S, S, width) with S = 1.5 `side`, whose middle `side` x `side` patches span the positions 0 to 16."""
    size = int(side * MARGIN)
    places = SPAN * (torch.arange(size, dtype=torch.float64) - (size - side) / 2) / side
    waves = sinusoids(places, width // 2)
    down, across = waves[:, None].expand(-1, size, -1), waves[None].expand(size, -1, -1)
    return torch.cat([across, down], dim=-1).float()


def sinusoids(places: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): sines, then cosines, of frequencies from 1 towards 1 / 10000."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = places[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
