"""What is cached of a run's data: latents, masks and text features, each under its keys, and read by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sfumato.data.batch import Tensors, pad_stack
from sfumato.data.cache.entries import (
    LATENTS,
    REFERENCE,
    CacheItem,
    LatentKeys,
    Store,
    TensorCache,
    TextKeys,
    make_entry_seed,
)
from sfumato.data.cache.sharing import FillCounts
from sfumato.data.images import Pixels
from sfumato.data.masks import MASK, MaskItem, MaskKeys, downscale_mask
from sfumato.data.painted import PaintedItem, PaintedKeys
from sfumato.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """An image, as cached latents or decoded pixels, and its mask."""

    entry_seed: int
    latents: Tensor | None = None
    pixels: Pixels | None = None
    mask: Tensor | None = None  # (1, h, w)
    painted: Tensor | None = None  # latents of the image without what is painted, where they are cached


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """The cached output of one text encoder. `rewrite`: the training method's change of a caption before encoding."""

    cache: TensorCache
    keys: TextKeys
    rewrite: Callable[[str], str] = str

    def load_stacked(self, captions: Sequence[str]) -> Tensors:
        """Feature name -> (B, ...), padded to the longest caption; UserError if an entry is missing."""
        entries = [self._load(caption) for caption in captions]
        stacked: Tensors = {}
        for name in entries[0]:
            stacked[name] = pad_stack([features[name] for features in entries])
        return stacked

    def _load(self, caption: str) -> Tensors:
        key = self.keys.make_key(self.rewrite(caption))
        return get_cached(self.cache, key, f"text features of {caption[:60]!r}")


@dataclass(kw_only=True)
class Caches:
    """The caches of a run and what filling them did.

    Keys are known where nothing is cached, too: that of an image's latents seeds the noise of the autoencoder's
    posterior.
    """

    latent_keys: LatentKeys
    mask_keys: MaskKeys
    latents: TensorCache | None = None  # and of masks; None where images are decoded
    painted_keys: PaintedKeys | None = None  # of what a model for inpainting sees of images with masks
    text: dict[str, TextFeatures] = field(default_factory=dict)  # of the encoders whose output is cached
    counts: dict[str, FillCounts] = field(default_factory=dict)  # "latents", "masks", "text of clip_l"

    @property
    def cached_networks(self) -> list[str]:
        """The networks whose output comes from a cache, the autoencoder as "vae"."""
        return [*self.text, *([] if self.latents is None else ["vae"])]

    def read_image(self, item: CacheItem, mask_item: MaskItem | None) -> LoadedImage:
        """From the cache or from its file. UserError where it cannot be read."""
        return self._decode(item, mask_item) if self.latents is None else self._load(self.latents, item, mask_item)

    def read_partner(self, item: CacheItem) -> Tensor | Pixels:
        """A reference image, or a control image that is read like one: latents (C, h, w) or pixels."""
        if self.latents is None:
            return item.read_pixels()
        key = replace(self.latent_keys, role=REFERENCE).make_key(item)
        return get_cached(self.latents, key, f"latents of {item.image.path}")[LATENTS]

    def _load(self, cache: TensorCache, item: CacheItem, mask_item: MaskItem | None) -> LoadedImage:
        key = self.latent_keys.make_key(item)
        mask = painted = None
        if mask_item is not None:
            mask_key = self.mask_keys.make_key(mask_item)
            mask = get_cached(cache, mask_key, f"mask of {mask_item.image.path}")[MASK]
        latents = get_cached(cache, key, f"latents of {item.image.path}")[LATENTS]
        if self.painted_keys is not None and mask_item is not None:
            painted_key = self.painted_keys.make_key(PaintedItem(item, mask_item))
            painted = get_cached(cache, painted_key, f"masked latents of {item.image.path}")[LATENTS]
        return LoadedImage(latents=latents, mask=mask, painted=painted, entry_seed=make_entry_seed(key))

    def _decode(self, item: CacheItem, mask_item: MaskItem | None) -> LoadedImage:
        data = item.image.read()
        if mask_item is not None and mask_item.channel == "alpha":  # decode the file only once
            pixels, full_mask = item.read_pixels_with_alpha(data)
        else:
            pixels, full_mask = item.read_pixels(data), None if mask_item is None else mask_item.read()
        mask = None if full_mask is None else downscale_mask(full_mask, self.mask_keys.downscale)
        return LoadedImage(pixels=pixels, mask=mask, entry_seed=make_entry_seed(self.latent_keys.make_key(item, data)))

    def close(self) -> None:
        """Close the stores; nothing can be read any more."""
        stores: dict[int, Store] = {}  # by identity: caches share them
        for cache in (self.latents, *(features.cache for features in self.text.values())):
            if cache is not None:
                stores[id(cache.store)] = cache.store
        for store in stores.values():
            store.close()


def get_cached(cache: TensorCache, key: bytes, what: str) -> Tensors:
    """The tensors of a cache entry; UserError, with `what` it is, if it is missing or damaged."""
    tensors = cache.get(key)
    if tensors is None:
        raise UserError(
            f"cannot read the cached {what}",
            code="cache-entry-unreadable",
            fix="start the run again; it recreates the entry",
        )
    return tensors
