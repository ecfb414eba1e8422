"""Loss masks from mask files and alpha channels, scaled to the resolution of the latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfumato.data.augment import ImageRules
from sfumato.data.cache.entries import ContentHashes, TensorCache, make_key
from sfumato.data.cache.references import write_reference
from sfumato.data.cache.sharing import FillCounts, FillOptions, share_work
from sfumato.data.find.image_table import ImageRow
from sfumato.data.images import Mask, Transform, hash_content, prepare_mask, prepare_with_alpha
from sfumato.data.plans import DataPlan, Item

MASK = "mask"
MASKS_AT_ONCE = 64  # masks prepared in parallel before they are reported


def find_mask(item: Item, rules: ImageRules, transform: Transform) -> MaskItem | None:
    """The mask of an image; None if it has none. A mask file takes precedence over the alpha channel."""
    if rules.masked_loss and item.conditioning is not None:
        return MaskItem(item.conditioning, "red", transform.geometry)
    return MaskItem(item.image, "alpha", transform.geometry) if rules.alpha_mask else None


def list_mask_items(plan: DataPlan) -> list[MaskItem]:
    """Every mask that training with cached latents can use, including flipped ones, without duplicates."""
    items: dict[MaskItem, None] = {}
    for _, subset, item in plan.iterate_used():
        rules = subset.settings.images
        for flip in (False, True) if rules.flip_aug else (False,):
            mask_item = find_mask(item, rules, item.center_transform(rules, flip=flip))
            if mask_item is not None:
                items[mask_item] = None
    return list(items)


def downscale_mask(mask: Mask, downscale: int) -> Tensor:
    """(H, W) of 0 to 255 -> (1, h, w) float32 in [0, 1]: the mean of each square of `downscale` pixels a side."""
    height, width = mask.shape
    squares = mask.reshape(height // downscale, downscale, width // downscale, downscale)
    return torch.from_numpy(squares.mean((1, 3), dtype=np.float32) / np.float32(255))[None]


def fill_masks(
    cache: TensorCache,
    mask_keys: MaskKeys,
    items: Sequence[MaskItem],
    *,
    workers: int = 2,
    options: FillOptions | None = None,
) -> FillCounts:
    """Create the missing masks, shared among processes like latents. UserError if a file cannot be read."""
    options = options or FillOptions()
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-masks") as pool:
        items_by_key = dict(zip(pool.map(mask_keys.make_key, items), items, strict=True))
        if options.reference:
            hash_keys = {mask_keys.hashes.make_key(item.image) for item in items}
            write_reference(options.reference, [*items_by_key, *hash_keys])

        def make(missing: Sequence[bytes]) -> Iterator[int]:
            for start in range(0, len(missing), MASKS_AT_ONCE):
                keys = missing[start : start + MASKS_AT_ONCE]
                masks = pool.map(lambda key: items_by_key[key].read(), keys)
                for key, mask in zip(keys, masks, strict=True):
                    cache.put(key, {MASK: downscale_mask(mask, mask_keys.downscale)})
                yield len(keys)

        return share_work(cache, list(items_by_key), make, options)


@dataclass(frozen=True, kw_only=True)
class MaskKeys:
    """Cache keys of masks: from the file's content, its channel, the transform and the size of a latent pixel."""

    downscale: int  # pixels a side that become one of the latents'
    hashes: ContentHashes

    def make_key(self, item: MaskItem, data: bytes | None = None) -> bytes:
        """data: the file's bytes if they are already in memory."""
        content = self.hashes.hash_image(item.image) if data is None else hash_content(data)
        return make_key(MASK, item.channel, str(self.downscale), item.transform.cache_name(item.image.size), content)


class MaskItem(NamedTuple):
    """One mask and its transform."""

    image: ImageRow  # the file that contains it
    channel: Literal["red", "alpha"]
    transform: Transform

    def read(self) -> Mask:
        """uint8 (H, W), 255 for full weight; UserError if the file is damaged."""
        path, size = self.image.path, self.image.size
        if self.channel == "red":
            return prepare_mask(self.image.read(), self.transform, size=size, path=path)
        return prepare_with_alpha(self.image.read(), self.transform, size=size, path=path)[1]
