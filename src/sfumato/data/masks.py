"""How much each place of a picture counts in the loss: mask files and alpha channels, as fine as the latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfumato.data.augment import ImageRules
from sfumato.data.cache.entries import ContentHashes, Counts, Filling, TensorCache, key_of, share_work
from sfumato.data.cache.references import remember
from sfumato.data.find.image_table import Picture
from sfumato.data.images import Plane, Transform, content_hash, prepare_red, prepare_with_alpha
from sfumato.data.plans import DataPlan, Item

MASK = "mask"
AT_ONCE = 64  # masks made between two looks at the store


def mask_of(item: Item, rules: ImageRules, transform: Transform) -> MaskPlace | None:
    """Where a picture's mask comes from; None where all of it counts. A mask file goes before the alpha channel."""
    if rules.masked_loss and item.conditioning is not None:
        return MaskPlace(item.conditioning, "red", transform.geometry)
    return MaskPlace(item.picture, "alpha", transform.geometry) if rules.alpha_mask else None


def mask_places(plan: DataPlan) -> list[MaskPlace]:
    """Every mask that training over cached latents can ask for, mirrored ones included, once each."""
    found: dict[MaskPlace, None] = {}
    for _, subset, item in plan.used():
        rules = subset.settings.images
        for flip in (False, True) if rules.flip_aug else (False,):
            place = mask_of(item, rules, item.transform(rules, flip=flip))
            if place is not None:
                found[place] = None
    return list(found)


def reduced(plane: Plane, downscale: int) -> Tensor:
    """(H, W) of 0 to 255 -> (1, h, w) float32 in [0, 1]: the mean of each square of `downscale` pixels a side."""
    height, width = plane.shape
    squares = plane.reshape(height // downscale, downscale, width // downscale, downscale)
    return torch.from_numpy(squares.mean((1, 3), dtype=np.float32) / np.float32(255))[None]


def fill_masks(
    cache: TensorCache,
    names: MaskNames,
    places: Sequence[MaskPlace],
    *,
    workers: int = 2,
    how: Filling | None = None,
) -> Counts:
    """Make what is missing, shared among processes like latents. UserError names a file that cannot be read."""
    how = how or Filling()
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-masks") as pool:
        wanted = dict(zip(pool.map(names.key, places), places, strict=True))
        if how.use:
            remember(how.use, [*wanted, *{names.hashes.key(place.picture) for place in places}])

        def make(missing: Sequence[bytes]) -> Iterator[int]:
            for start in range(0, len(missing), AT_ONCE):
                keys = missing[start : start + AT_ONCE]
                planes = pool.map(lambda key: wanted[key].plane(), keys)
                for key, plane in zip(keys, planes, strict=True):
                    cache.put(key, {MASK: reduced(plane, names.downscale)})
                yield len(keys)

        return share_work(cache, list(wanted), make, how)


@dataclass(frozen=True, kw_only=True)
class MaskNames:
    """Names masks in a cache: by the file's content, its channel, the transform and the size of a latent pixel."""

    downscale: int  # pixels a side that become one of the latents'
    hashes: ContentHashes

    def key(self, place: MaskPlace, data: bytes | None = None) -> bytes:
        """data: the file's bytes where they are at hand, so that it need not be read again."""
        content = self.hashes.of(place.picture) if data is None else content_hash(data)
        return key_of(MASK, place.channel, str(self.downscale), place.transform.name(place.picture.size), content)


class MaskPlace(NamedTuple):
    """One mask as one bucket sees it."""

    picture: Picture  # the file it is in
    channel: Literal["red", "alpha"]
    transform: Transform

    def plane(self) -> Plane:
        """uint8 (H, W), 255 where everything counts; UserError names the file where it is damaged."""
        path, size = self.picture.path, self.picture.size
        if self.channel == "red":
            return prepare_red(self.picture.read(), self.transform, size=size, path=path)
        return prepare_with_alpha(self.picture.read(), self.transform, size=size, path=path)[1]
