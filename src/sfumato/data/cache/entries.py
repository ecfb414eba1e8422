"""Caches of encoder outputs: their keys, and filling what is missing; the encoders are passed in as functions."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from sfumato.data.batch import Tensors
from sfumato.data.buckets import Size
from sfumato.data.cache.references import CacheReference, write_reference
from sfumato.data.cache.shards import KEY_BYTES
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.find.image_table import ImageRow
from sfumato.data.find.traits import CONVERTED
from sfumato.data.images import Mask, Pixels, Transform, hash_content, prepare_pixels, prepare_with_alpha
from sfumato.data.plans import DataPlan
from sfumato.errors import UserError

Store = MemoryStore | DiskStore
EncodeImages = Callable[[Tensor, Sequence[int]], Tensor]  # (B, 3, H, W) in [-1, 1], noise seeds -> (B, C, h, w)
EncodeText = Callable[[Sequence[str]], Sequence[Mapping[str, Tensor]]]  # captions -> features of each
FillProgress = Callable[[int, int], None]  # done, total

LATENTS = "latents"
REFERENCE = "reference"  # a role in keys: the latents are the mode of the autoencoder's posterior
SizedT = TypeVar("SizedT", bound="HasTransform")
PEER_TIMEOUT = 60.0  # seconds without new entries from other processes, after which their share is created here


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
            for (key, item), tensor in zip(batch, convert_for_storage(latents, latent_keys.dtype), strict=True):
                if not torch.isfinite(tensor).all():
                    raise make_not_finite_error([item.image])
                cache.put(key, {LATENTS: tensor})

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


def share_work(
    cache: TensorCache, keys: Sequence[bytes], make: Callable[[Sequence[bytes]], Iterator[int]], options: FillOptions
) -> FillCounts:
    """Create the missing entries of this process's share, and wait until the other processes have created theirs.

    Nothing here has the time limit of a collective call; what the others have not created, e.g. on machines that share
    no store after all, is created here. With options.check every process reads every entry, so that all of them know
    which are damaged.
    """
    keys = [key for key in keys if belongs_to_part(key[:4], options.machine, options.machines)]
    if options.check:
        cache.store.check(keys)
    missing = cache.find_missing(keys)
    if missing and options.refuse:
        raise options.refuse(len(missing), len(keys))
    alone = options.processes == 1 or not cache.store.shared
    own_share = (
        missing if alone else [key for key in missing if belongs_to_part(key[-4:], options.rank, options.processes)]
    )
    created = run_and_report(make(own_share), len(own_share), options.progress)
    cache.store.flush()
    options.meet()
    left = [] if alone else list_missing(cache, missing)
    deadline = time.monotonic() + PEER_TIMEOUT
    while left:
        if time.monotonic() > deadline:
            created += run_and_report(make(left), len(left), options.progress)
            break
        time.sleep(0.1)
        count, left = len(left), list_missing(cache, left)
        if len(left) < count:
            deadline = time.monotonic() + PEER_TIMEOUT
    cache.store.flush()
    return FillCounts(existing=len(keys) - len(missing), created=created)


def meet_nobody() -> None:
    """Where processes know of each other by the store alone."""


def belongs_to_part(bits: bytes, part: int, parts: int) -> bool:
    return int.from_bytes(bits, "little") % parts == part


def list_missing(cache: TensorCache, keys: Sequence[bytes]) -> list[bytes]:
    """The keys that are still missing after reading what other processes have added."""
    cache.store.refresh()
    return cache.find_missing(keys)


def run_and_report(work: Iterator[int], total: int, progress: FillProgress | None) -> int:
    """Run the work, which yields counts of created entries, and report its progress; returns the number of entries."""
    done = 0
    for more in work:
        done += more
        if progress is not None:
            progress(done, total)
    return done


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


class HasTransform(Protocol):
    """What has the size of a bucket."""

    @property
    def transform(self) -> Transform: ...


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


@dataclass(frozen=True, kw_only=True)
class FillOptions:
    """How filling a cache is shared, checked and reported. Machines share no store and do not wait for each other."""

    rank: int = 0
    processes: int = 1  # of one machine, or of several with a common store
    machine: int = 0
    machines: int = 1
    check: bool = False  # whether to read the existing entries once, and create damaged ones again
    meet: Callable[[], object] = meet_nobody  # waits until all processes have created their share
    reference: CacheReference | None = None  # who needs the entries, stored so that pruning keeps them
    progress: FillProgress | None = None
    refuse: Callable[[int, int], UserError] | None = None  # missing, all -> the error, where nothing can be encoded


class FillCounts(NamedTuple):
    """Numbers of entries after filling a cache."""

    existing: int  # that existed before
    created: int  # by this process
