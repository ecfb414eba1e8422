"""The image files of a request as latents: a reference, an image to start from and its mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.data.batch import CONTROL_MASK, INPAINT, ImageInput, Images, name_control, name_reference
from sfumato.data.buckets import Size
from sfumato.data.cache.entries import to_tensor
from sfumato.data.images import read_image
from sfumato.data.masks import downscale_mask
from sfumato.families.base import Family
from sfumato.families.encoding import encode_images, encode_inpaint
from sfumato.sampling.control_images import NO_PREPARATION, prepare_control_image
from sfumato.sampling.request import ImageRequest
from sfumato.sampling.start import Start

_T = TypeVar("_T")
HALF_WHITE = 128  # of 255: what is as white as this is painted


def encode_request_images(model: Family, request: ImageRequest, count: int) -> Images:
    """The further images of a request for so many samples; UserError where one cannot be read."""
    images: dict[str, ImageInput] = {}
    if request.reference_image:
        image = read_image(Path(request.reference_image))
        latents = encode_resized(model, image, model.choose_reference_size(image.size, (request.width, request.height)))
        images[name_reference(0)] = ImageInput(latents=latents.expand(count, -1, -1, -1))
    return {**images, **encode_controls(model, request, count), **encode_painted(model, request, count)}


def encode_controls(model: Family, request: ImageRequest, count: int) -> Images:
    """What each ControlNet or LLLite reads, with its strength and its share of the steps."""
    images: dict[str, ImageInput] = {}
    files, control = [request.control_image, *request.control.further_control_images], request.control
    for number in range(model.num_controls if request.control_image else 0):
        image = read_image(Path(files[number % len(files)]))
        prepared = prepare_control_image(image, find_nth(control.control_net_preps, number, NO_PREPARATION))
        size = (request.width, request.height)
        latents = encode_resized(model, prepared, size) if model.reads_control_latents(number) else None
        pixels = resize_to_tensor(prepared, size) if model.reads_control_pixels(number) else None
        images[name_control(number)] = ImageInput(
            latents=None if latents is None else latents.expand(count, -1, -1, -1),
            pixels=None if pixels is None else pixels.expand(count, -1, -1, -1),
            strength=find_nth(control.control_net_multipliers, number, 1.0),
            starts_at=find_nth(control.control_net_starts, number, 0.0),
            ends_at=find_nth(control.control_net_ratios, number, 1.0),
        )
    if request.control_mask:
        mask = read_white(request.control_mask, (request.width, request.height))
        images[CONTROL_MASK] = ImageInput(pixels=mask.expand(count, -1, -1, -1))
    return images


def find_nth(values: Sequence[_T], number: int, default: _T) -> _T:
    """The value of this number, counted from 0, where there are so many."""
    return values[number] if number < len(values) else default


def encode_start(model: Family, request: ImageRequest, count: int) -> Start | None:
    """The image that a request starts from, for so many samples; UserError where it cannot be read.

    A model for inpainting sees the image and the mask and keeps by itself what is outside, as in diffusers.
    """
    paints = model.blueprint.inpaints
    if request.start is None or (paints and request.start.strength >= 1):
        return None
    size = (request.width, request.height)
    latents = encode_resized(model, read_image(Path(request.start.init_image)), size).to(model.device)
    mask = None if paints else read_mask(model, request.start.mask_image, size)
    return Start(
        latents=latents.expand(count, -1, -1, -1),
        strength=request.start.strength,
        mask=None if mask is None else mask.to(model.device),
    )


def encode_painted(model: Family, request: ImageRequest, count: int) -> Images:
    """What a model for inpainting sees beside the noise: without a mask all is painted, without an image gray."""
    if not model.blueprint.inpaints:
        return {}
    size, start = (request.width, request.height), request.start
    pixels, mask = torch.zeros(1, 3, *size[::-1]), torch.ones(1, 1, *size[::-1])
    if start is not None:
        pixels = resize_to_tensor(read_image(Path(start.init_image)), size)
    if start is not None and start.mask_image:
        mask = read_white(start.mask_image, size)
    latents = encode_inpaint(model, pixels, mask, None, vae_batch_size=1)
    return {INPAINT: ImageInput(latents=latents.expand(count, -1, -1, -1))}


def read_white(file: str, size: Size) -> Tensor:
    """Where a mask file is white, at (width, height): (1, 1, H, W) of 0 and 1."""
    white = np.asarray(read_image(Path(file)).resize(size, Image.Resampling.BILINEAR))[..., 0]
    return torch.from_numpy(white >= HALF_WHITE).float()[None, None]


def encode_resized(model: Family, image: Image.Image, size: Size) -> Tensor:
    """An image at another size, (width, height) -> its latents (1, C, h, w)."""
    return encode_images(model, resize_to_tensor(image, size), None, vae_batch_size=1)


def resize_to_tensor(image: Image.Image, size: Size) -> Tensor:
    """An image at another size, (width, height) -> (1, 3, H, W) in [-1, 1]."""
    return to_tensor([np.asarray(image.resize(size, Image.Resampling.LANCZOS))])


def read_mask(model: Family, file: str, size: Size) -> Tensor | None:
    """A mask's red channel at the size of the latents, (1, 1, h, w) in [0, 1]; None where there is none."""
    if not file:
        return None
    image = read_image(Path(file)).resize(size, Image.Resampling.BILINEAR)
    return downscale_mask(np.asarray(image)[..., 0], model.latents.downscale)[None].float().clamp(0, 1)
