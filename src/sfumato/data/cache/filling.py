"""Filling caches of latents and of text features with what is missing; the encoders are passed in as functions."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sfumato.data.batch import Tensors
from sfumato.data.buckets import Size
from sfumato.data.cache.entries import LATENTS, CacheItem, LatentKeys, TensorCache, TextKeys, make_entry_seed, to_tensor
from sfumato.data.cache.references import write_reference
from sfumato.data.cache.sharing import FillCounts, FillOptions, share_work
from sfumato.data.find.image_table import ImageRow
from sfumato.data.images import Pixels, Transform
from sfumato.data.plans import DataPlan
from sfumato.errors import UserError

EncodeImages = Callable[[Tensor, Sequence[int]], Tensor]  # (B, 3, H, W) in [-1, 1], noise seeds -> (B, C, h, w)
EncodeText = Callable[[Sequence[str]], Sequence[Mapping[str, Tensor]]]  # captions -> features of each
SizedT = TypeVar("SizedT", bound="HasTransform")


def list_latent_items(plan: DataPlan) -> list[CacheItem]:
    """Every image that training can use, including flipped ones, without duplicates."""
    items: dict[CacheItem, None] = {}
    for _, subset, item in plan.iterate_used():
        if subset.settings.concept is not None:
            continue
        rules = subset.settings.images
        for flip in (False, True) if rules.flip_aug else (False,):
            items[CacheItem(item.image, item.center_transform(rules, flip=flip))] = None
    return list(items)


def fill_latents(
    cache: TensorCache,
    latent_keys: LatentKeys,
    items: Sequence[CacheItem],
    encode: EncodeImages,
    *,
    batch_size: int = 1,
    workers: int = 2,
    options: FillOptions | None = None,
) -> FillCounts:
    """Encode the missing images, in batches of one size; images are read and resized while the encoder works.

    Several processes share the work, and each returns when all entries exist. UserError if an image cannot be read or
    its latents are not finite.
    """
    options = options or FillOptions()
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-cache") as pool:
        keys = make_item_keys(latent_keys, items, pool)
        items_by_key = dict(zip(keys, items, strict=True))
        if options.reference:
            hash_keys = {latent_keys.hashes.make_key(item.image) for item in items}
            write_reference(options.reference, [*items_by_key, *hash_keys])

        def write(batch: Sequence[tuple[bytes, CacheItem]], latents: Tensor) -> None:
            put_latents(cache, [(key, item.image) for key, item in batch], latents, latent_keys.dtype)

        def make(missing: Sequence[bytes]) -> Iterator[int]:
            with ThreadPoolExecutor(1, thread_name_prefix="sfumato-write") as writer:
                writing: Future[None] | None = None  # at most one batch at a time; its result raises its errors
                for batch, pixels in decode_ahead(batch_by_size(missing, items_by_key, batch_size), pool, workers):
                    latents = encode(pixels, [make_entry_seed(key) for key, _ in batch])
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(write, batch, latents)
                    yield len(batch)
                if writing is not None:
                    writing.result()

        return share_work(cache, list(items_by_key), make, options)


def make_item_keys(latent_keys: LatentKeys, items: Sequence[CacheItem], pool: ThreadPoolExecutor) -> list[bytes]:
    """The keys of all items, in order; made by threads, since a new image file is read for its hash."""
    chunks = [items[start : start + 200] for start in range(0, len(items), 200)]
    keys: list[bytes] = []
    for chunk_keys in pool.map(lambda chunk: [latent_keys.make_key(item) for item in chunk], chunks):
        keys += chunk_keys
    return keys


def put_latents(
    cache: TensorCache, batch: Sequence[tuple[bytes, ImageRow]], latents: Tensor, dtype: torch.dtype
) -> None:
    """Store the latents (B, C, h, w) of these images under their keys. UserError where they are not finite."""
    for (key, image), tensor in zip(batch, convert_for_storage(latents, dtype), strict=True):
        if not torch.isfinite(tensor).all():
            raise make_not_finite_error([image])
        cache.put(key, {LATENTS: tensor})


def make_not_finite_error(images: Sequence[ImageRow]) -> UserError:
    """The error for images whose latents contain NaN or inf even if the autoencoder runs in float32."""
    names = ", ".join(image.path for image in images[:4]) or "an image"
    return UserError(
        f"the latents of {names} contain NaN or inf, even in float32",
        code="latents-not-finite",
        fix="the autoencoder is damaged or belongs to another model; give another one with --vae",
    )


def fill_text(
    cache: TensorCache,
    text_keys: TextKeys,
    captions: Sequence[str],
    encode: EncodeText,
    *,
    batch_size: int = 1,
    options: FillOptions | None = None,
) -> FillCounts:
    """Encode the missing captions, by default one at a time, so that no result depends on the rest of its batch.

    Processes share the work like in `fill_latents`.
    """
    options = options or FillOptions()
    captions_by_key = {text_keys.make_key(caption): caption for caption in captions}
    if options.reference:
        write_reference(options.reference, list(captions_by_key))

    def make(missing: Sequence[bytes]) -> Iterator[int]:
        for start in range(0, len(missing), batch_size):
            keys = missing[start : start + batch_size]
            encoded = encode([captions_by_key[key] for key in keys])
            for key, features in zip(keys, encoded, strict=True):
                tensors: Tensors = {}
                for name, tensor in features.items():
                    tensors[name] = convert_for_storage(tensor, text_keys.dtype)
                cache.put(key, tensors)
            yield len(keys)

    return share_work(cache, list(captions_by_key), make, options)


def batch_by_size(
    keys: Sequence[bytes], items: Mapping[bytes, SizedT], batch_size: int
) -> Iterator[list[tuple[bytes, SizedT]]]:
    """Batches of one bucket each; only the last batch of a bucket is smaller."""
    by_bucket: defaultdict[Size, list[tuple[bytes, SizedT]]] = defaultdict(list)
    for key in keys:
        by_bucket[items[key].transform.bucket].append((key, items[key]))
    for size in sorted(by_bucket):
        group = by_bucket[size]
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def decode_ahead(
    batches: Iterator[list[tuple[bytes, CacheItem]]], pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[list[tuple[bytes, CacheItem]], Tensor]]:
    """Each batch with its pixels, in order; at least the next two are decoded in the background."""
    waiting: deque[tuple[list[tuple[bytes, CacheItem]], Future[Tensor]]] = deque()
    while True:
        pending = sum(len(batch) for batch, _ in waiting)
        while len(waiting) < 3 or pending < 2 * max(workers, 1):
            batch = next(batches, None)
            if batch is None:
                break
            parts = [pool.submit(item.read_pixels) for _, item in batch]
            waiting.append((batch, pool.submit(join_pixels, parts)))  # after its parts, so it never blocks them
            pending += len(batch)
        if not waiting:
            return
        batch, pixels = waiting.popleft()
        yield batch, pixels.result()


def join_pixels(parts: Sequence[Future[Pixels]]) -> Tensor:
    return to_tensor([part.result() for part in parts])


def convert_for_storage(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor on the CPU, floating-point ones in `dtype`; other tensors and None keep theirs."""
    stored_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", stored_dtype)


class HasTransform(Protocol):
    """What has the size of a bucket."""

    @property
    def transform(self) -> Transform: ...
