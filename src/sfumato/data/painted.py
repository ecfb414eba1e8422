"""What a model for inpainting sees of images with masks of their own: the rest of the image as latents, cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.cache.entries import CacheItem, LatentKeys, TensorCache, make_entry_seed, make_key, to_tensor
from sfumato.data.cache.filling import batch_by_size, put_latents
from sfumato.data.cache.references import write_reference
from sfumato.data.cache.sharing import FillCounts, FillOptions, share_work
from sfumato.data.images import Transform
from sfumato.data.masks import MaskItem, MaskKeys, downscale_mask, find_mask
from sfumato.data.plans import DataPlan
from sfumato.errors import UserError

# Pixels (B, 3, H, W) in [-1, 1], masks (B, 1, H, W), seeds of the posterior's noise -> (B, C, h, w).
EncodePainted = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


class PaintedItem(NamedTuple):
    """One image and its mask."""

    item: CacheItem
    mask: MaskItem

    @property
    def transform(self) -> Transform:
        return self.item.transform


@dataclass(frozen=True, kw_only=True)
class PaintedKeys:
    """Cache keys: those of the image's latents and of its mask together."""

    latents: LatentKeys
    masks: MaskKeys

    def make_key(self, item: PaintedItem) -> bytes:
        return make_key("painted", self.latents.make_key(item.item), self.masks.make_key(item.mask))


def list_painted_items(plan: DataPlan) -> list[PaintedItem]:
    """Every image with a mask that training with cached latents can use, including flipped ones."""
    items: dict[PaintedItem, None] = {}
    for _, subset, item in plan.iterate_used():
        rules = subset.settings.images
        for flip in (False, True) if rules.flip_aug else (False,):
            transform = item.center_transform(rules, flip=flip)
            mask = find_mask(item, rules, transform)
            if mask is not None:
                items[PaintedItem(CacheItem(item.image, transform), mask)] = None
    return list(items)


def says_what_is_painted(mask: Tensor) -> bool:
    """Whether a mask says what is painted; one that is all white does not, as for an image without any."""
    return not bool((mask == 1).all())


def enlarge_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask of latents (1, h, w) in [0, 1] -> (1, H, W) of 0 and 1."""
    return F.interpolate(mask[None], size=(height, width))[0].round()


def fill_painted(
    cache: TensorCache,
    keys: PaintedKeys,
    items: Sequence[PaintedItem],
    encode: EncodePainted,
    *,
    batch_size: int = 1,
    workers: int = 2,
    options: FillOptions | None = None,
) -> FillCounts:
    """Encode what is missing, shared among processes like latents. UserError where a mask is white everywhere."""
    options = options or FillOptions()
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-painted") as pool:
        items_by_key = dict(zip(pool.map(keys.make_key, items), items, strict=True))
        if options.reference:
            write_reference(options.reference, list(items_by_key))

        def read(item: PaintedItem) -> tuple[Tensor, Tensor]:
            pixels = to_tensor([item.item.read_pixels()])
            mask = downscale_mask(item.mask.read(), keys.masks.downscale)
            if not says_what_is_painted(mask):
                raise make_white_error(item)
            return pixels, enlarge_mask(mask, *pixels.shape[-2:])[None]

        def make(missing: Sequence[bytes]) -> Iterator[int]:
            for batch in batch_by_size(missing, items_by_key, batch_size):
                pixels, masks = zip(*pool.map(read, [item for _, item in batch]), strict=True)
                seeds = [make_entry_seed(keys.latents.make_key(item.item)) for _, item in batch]
                latents = encode(torch.cat(pixels), torch.cat(masks), seeds)
                put_latents(cache, [(key, item.item.image) for key, item in batch], latents, keys.latents.dtype)
                yield len(batch)

        return share_work(cache, list(items_by_key), make, options)


def make_white_error(item: PaintedItem) -> UserError:
    return UserError(
        f"the mask of {item.item.image.path} is white everywhere: what is painted would be drawn at random each time, "
        "which cannot be cached",
        code="inpainting-mask-white",
        fix="remove --cache_latents, or give it a mask with black parts, which stay",
    )
