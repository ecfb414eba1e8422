"""Reference images: how they fit the batches of the images that they belong to, and their cached latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sfumato.data.augment import ImageRules
from sfumato.data.batch import ImageInput, Images, name_reference
from sfumato.data.buckets import Size, resize_to_cover
from sfumato.data.cache.entries import CacheItem, to_tensor
from sfumato.data.find.image_table import ImageRow
from sfumato.data.images import Pixels, Transform, choose_interpolation
from sfumato.data.plans import DataPlan, Item


def list_reference_items(plan: DataPlan, *, control: bool) -> list[CacheItem]:
    """Every reference image that training with cached latents can use, including flipped ones, without duplicates.

    control: and every control image, since these are latents, too.
    """
    items: dict[CacheItem, None] = {}
    for _, subset, item in plan.iterate_used():
        rules = subset.settings.images
        for flip in (False, True) if rules.flip_aug else (False,):
            transform = item.center_transform(rules, flip=flip)
            items |= dict.fromkeys(fit_references(item, rules, transform))
            fitted = fit_control(item, rules, transform) if control else None
            items |= {fitted: None} if fitted else {}
    return list(items)


def fit_control(item: Item, rules: ImageRules, transform: Transform) -> CacheItem | None:
    """The control image of an image, cropped and flipped with it; None where it has none, e.g. but a mask."""
    if rules.masked_loss or item.conditioning is None:
        return None
    return CacheItem(item.conditioning, transform.geometry)


def fit_references(item: Item, rules: ImageRules, transform: Transform) -> list[CacheItem]:
    """The reference images of an image, with the size of its bucket. transform: of the image."""
    return [fit_reference(reference, rules, transform) for reference in item.references]


def fit_reference(reference: ImageRow, rules: ImageRules, transform: Transform) -> CacheItem:
    """Cropped as its image where both have one shape, else around its own center; flipped with it, never recolored."""
    resized, offset = transform.resized, transform.offset
    if not have_one_shape(reference.size, resized):
        resized, offset = resize_to_cover(reference.size, transform.bucket), None
    interpolation = choose_interpolation(reference.size, resized, rules.resize_interpolation)
    fitted = replace(transform.geometry, resized=resized, offset=offset, interpolation=interpolation)
    return CacheItem(reference, fitted)


def have_one_shape(one: Size, other: Size) -> bool:
    """Whether the first, scaled to the width or the height of the second, has its other side to a pixel."""
    width, height = other
    return abs(one[1] * width / one[0] - height) <= 1 or abs(one[0] * height / one[1] - width) <= 1


def stack_references(rows: Sequence[Sequence[Tensor | Pixels | None]]) -> Images:
    """Role -> the reference images of a batch. rows: of each sample its references in order, None for a dropped one.

    Latents (C, h, w), or pixels uint8 (H, W, 3). A role that no sample of the batch has is left out.
    """
    images: dict[str, ImageInput] = {}
    for number in range(max(map(len, rows), default=0)):
        column = [row[number] if number < len(row) else None for row in rows]
        present = [image is not None for image in column]
        if any(present):
            marks = None if all(present) else torch.tensor(present)
            images[name_reference(number)] = replace(stack_images(column), present=marks)
    return images


def stack_images(column: Sequence[Tensor | Pixels | None]) -> ImageInput:
    """Images of one size, zeros for those that are missing."""
    first = next(image for image in column if image is not None)
    filled = [first * 0 if image is None else image for image in column]
    latents = [image for image in filled if isinstance(image, Tensor)]
    if latents:
        return ImageInput(latents=torch.stack(latents))
    return ImageInput(pixels=to_tensor([image for image in filled if not isinstance(image, Tensor)]))
