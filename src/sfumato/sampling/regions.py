"""Where the parts of an image are whose prompts are separated by AND: a mask's channels, or its colors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.data.images import read_image
from sfumato.data.masks import downscale_mask
from sfumato.families.base import Family
from sfumato.sampling.settings import RegionSettings

_CHANNELS = 3
_WHITE = 255


def read_region_weights(model: Family, settings: RegionSettings, size: tuple[int, int]) -> Tensor:
    """(parts, h, w) in the size of latents: the share of each part, 1 in all. size: (width, height) in pixels.

    Where no part is, all have the same share. UserError where the mask cannot be read.
    """
    count = len(settings.parts)
    width, height = (side // model.latents.downscale for side in size)
    masks = torch.ones(count, height, width)
    if settings.region_mask:
        pixels = np.asarray(read_image(Path(settings.region_mask)))
        for number in range(count):
            mask = select_part(pixels, number, settings.network_regional_mask_max_color_codes)
            if mask is not None:
                resized = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR))
                masks[number] = downscale_mask(resized, model.latents.downscale)[0].float().clamp(0, 1)
    total = masks.sum(0, keepdim=True)
    return torch.where(total > 0, masks / total.clamp(min=1e-6), torch.full_like(masks, 1 / count))


def select_part(pixels: np.ndarray, number: int, color_codes: int | None) -> np.ndarray | None:
    """pixels (H, W, 3) -> (H, W) uint8, white where the part of this number is, counted from 0; None: everywhere.

    color_codes: how many parts have a color, part n (from 1) that of the bits of n: red 1, green 2, blue 4.
    """
    if color_codes is None:
        mask = pixels[..., number] if number < _CHANNELS else None
    elif number < color_codes:
        code = [(number + 1 >> bit & 1) * _WHITE for bit in range(_CHANNELS)]
        mask = (pixels == code).all(-1).astype(np.uint8) * _WHITE
    else:
        mask = None
    return mask if mask is not None and mask.any() else None
