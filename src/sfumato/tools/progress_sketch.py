"""An image while it is made: its latents as colors by a linear map, fitted to the model's own autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from sfumato.common import files
from sfumato.families.base import Family
from sfumato.families.encoding import encode_images

FIT_SIDE = 24  # latents a side of the image that the map is fitted to
PATCHES = 7  # random colors a side of it, between which it is smooth
SHOWN_SIDE = 256  # pixels of the file's longer side, about


def fit_latent_colors(model: Family) -> Tensor:
    """(C + 1, 3): the least-squares map of latents, and 1, to the colors in [-1, 1] that they stand for.

    Fitted to one image of random colors, since what a channel means differs with every autoencoder.
    """
    colors = torch.rand(1, 3, PATCHES, PATCHES, generator=Generator().manual_seed(0)) * 2 - 1
    side = FIT_SIDE * model.latents.downscale
    pixels = F.interpolate(colors, size=(side, side), mode="bilinear", align_corners=True)
    with model.parts["vae"].hold():
        latents = encode_images(model, pixels, None, vae_batch_size=1)[0].float().cpu()
    means = F.avg_pool2d(pixels, model.latents.downscale)[0]
    return torch.linalg.lstsq(add_one(latents), means.flatten(1).T).solution


def add_one(latents: Tensor) -> Tensor:
    """(C, h, w) -> (h w, C + 1)."""
    rows = latents.flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)


class ProgressSketch:
    """Writes the images of a batch side by side to one file, each time in place of what was there."""

    def __init__(self, model: Family, path: Path) -> None:
        self.path = path
        self.colors = fit_latent_colors(model)

    def write(self, latents: Tensor) -> None:
        """latents (B, C, h, w), scaled, on any device."""
        rows = [self.paint(each.float().cpu()) for each in latents]
        pixels = ((torch.cat(rows, dim=2).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        factor = max(1, SHOWN_SIDE // max(latents.shape[-2:]))
        larger = image.resize((image.width * factor, image.height * factor), Image.Resampling.BILINEAR)
        with files.write_atomically(self.path) as temporary:
            larger.save(temporary, format="PNG")

    def paint(self, latents: Tensor) -> Tensor:
        """(C, h, w) -> (3, h, w) in about [-1, 1]."""
        return (add_one(latents) @ self.colors).T.reshape(3, *latents.shape[-2:])
