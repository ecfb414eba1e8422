"""Entries of the caches of encoder outputs: their keys, and tensors by key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from sfumato.data.batch import Tensors
from sfumato.data.cache.shards import KEY_BYTES
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.find.image_table import ImageRow
from sfumato.data.find.traits import CONVERTED
from sfumato.data.images import Mask, Pixels, Transform, hash_content, prepare_pixels, prepare_with_alpha

Store = MemoryStore | DiskStore
LATENTS = "latents"
REFERENCE = "reference"  # a role in keys: the latents are the mode of the autoencoder's posterior


def make_key(content_type: str, *facts: str | bytes) -> bytes:
    """The cache key of an entry: a hash of everything that its content depends on."""
    digest = hashlib.blake2b(content_type.encode(), digest_size=KEY_BYTES)
    for fact in facts:
        data = fact.encode("utf-8", "surrogatepass") if isinstance(fact, str) else fact
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def make_entry_seed(key: bytes) -> int:
    """The seed of the noise of the autoencoder's posterior, so that it is the same with and without a cache."""
    return int.from_bytes(key[:8], "little") >> 1


def to_tensor(pixels: Sequence[Pixels]) -> Tensor:
    """uint8 (H, W, 3) each -> float32 (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


class TensorCache:
    """Named tensors in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def get(self, key: bytes) -> Tensors | None:
        """The entry's tensors, on the CPU; None if it is missing or damaged."""
        content = self.store.get(key)
        return None if content is None else load(content)

    def put(self, key: bytes, tensors: Tensors) -> None:
        # clones, because a view would be written with the whole tensor that it belongs to
        self.store.put(
            key, save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
        )

    def find_missing(self, keys: Sequence[bytes]) -> list[bytes]:
        return self.store.find_missing(keys)


class ContentHashes:
    """Content hashes of image files, stored by path, size and modification time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._hashes: dict[tuple[str, int, int], bytes] = {}

    def make_key(self, image: ImageRow) -> bytes:
        """The key under which the hash is stored."""
        return make_key("content", image.path, str(image.byte_count), str(image.mtime_ns))

    def hash_image(self, image: ImageRow) -> bytes:
        """The content hash, from the store if the file is unchanged; UserError if it cannot be read."""
        facts = (image.path, image.byte_count, image.mtime_ns)
        if facts not in self._hashes:
            key = self.make_key(image)
            content = self.store.get(key)
            if content is None:
                content = hash_content(image.read())
                if self.store.writable and image.is_unchanged():
                    self.store.put(key, content)
            self._hashes[facts] = content
        return self._hashes[facts]


@dataclass(frozen=True, kw_only=True)
class LatentKeys:
    """Cache keys of latents: what they depend on besides the image. role: "" for those of the images themselves."""

    fingerprint: str  # of the encoder: its weights and whatever changes its output
    dtype: torch.dtype  # of the stored latents
    hashes: ContentHashes

    role: str = ""

    def make_key(self, item: CacheItem, data: bytes | None = None) -> bytes:
        """data: the file's bytes if they are already in memory."""
        content = self.hashes.hash_image(item.image) if data is None else hash_content(data)
        colors = ("to sRGB",) if item.image.traits & CONVERTED else ()  # other images have the keys of before
        roles = (f"role {self.role}",) if self.role else ()
        pixels = item.transform.cache_name(item.image.size)
        return make_key(LATENTS, self.fingerprint, str(self.dtype), pixels, content, *colors, *roles)


@dataclass(frozen=True, kw_only=True)
class TextKeys:
    """Cache keys of the features of one text encoder."""

    fingerprint: str
    dtype: torch.dtype | None = None  # of stored floating-point features; None for the encoder's own

    def make_key(self, caption: str) -> bytes:
        return make_key("text", self.fingerprint, str(self.dtype), caption)


class CacheItem(NamedTuple):
    """One image and its transform."""

    image: ImageRow
    transform: Transform

    def read_pixels(self, data: bytes | None = None) -> Pixels:
        """uint8 (H, W, 3); UserError if the file is damaged."""
        data = self.image.read() if data is None else data
        return prepare_pixels(data, self.transform, size=self.image.size, path=self.image.path)

    def read_pixels_with_alpha(self, data: bytes) -> tuple[Pixels, Mask]:
        """The pixels, and the alpha channel as uint8 (H, W)."""
        return prepare_with_alpha(data, self.transform, size=self.image.size, path=self.image.path)
