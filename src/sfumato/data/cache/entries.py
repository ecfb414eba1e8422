"""Encoders' outputs kept by the content they were made from; knows no model, encoders come as plain functions."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from sfumato.data.batch import Tensors
from sfumato.data.buckets import Size
from sfumato.data.cache.references import Use, remember
from sfumato.data.cache.store import KEY, DiskStore, MemoryStore
from sfumato.data.find.image_table import Picture
from sfumato.data.images import Pixels, Plane, Transform, content_hash, prepare, prepare_with_alpha
from sfumato.data.plans import DataPlan
from sfumato.errors import UserError

Store = MemoryStore | DiskStore
EncodeImages = Callable[[Tensor, Sequence[int]], Tensor]  # (B, 3, H, W) in [-1, 1], noise seeds -> (B, C, h, w)
EncodeText = Callable[[Sequence[str]], Sequence[Mapping[str, Tensor]]]  # captions -> features of each
Progress = Callable[[int, int], None]  # done, total

LATENTS = "latents"
PATIENCE = 60.0  # seconds without news from other processes, after which their share is done here


def key_of(kind: str, *facts: str | bytes) -> bytes:
    """The name of an entry: a hash of all that its content depends on."""
    digest = hashlib.blake2b(kind.encode(), digest_size=KEY)
    for fact in facts:
        data = fact.encode("utf-8", "surrogatepass") if isinstance(fact, str) else fact
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def seed_of_entry(key: bytes) -> int:
    """The seed of the noise with which an autoencoder's posterior is drawn, so that it is the same cached or not."""
    return int.from_bytes(key[:8], "little") >> 1


def to_tensor(pixels: Sequence[Pixels]) -> Tensor:
    """uint8 (H, W, 3) each -> float32 (B, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def latent_places(plan: DataPlan) -> list[Place]:
    """Everything that training can ask for, mirrored images included, once each."""
    found: dict[Place, None] = {}
    for _, subset, item in plan.used():
        rules = subset.settings.images
        for flip in (False, True) if rules.flip_aug else (False,):
            found[Place(item.picture, item.transform(rules, flip=flip))] = None
    return list(found)


def fill_latents(
    cache: TensorCache,
    names: LatentNames,
    places: Sequence[Place],
    encode: EncodeImages,
    *,
    batch_size: int = 1,
    workers: int = 2,
    how: Filling | None = None,
) -> Counts:
    """Encode what is missing, in batches of one size; images are read and resized while the encoder works.

    Several processes share the work and each returns once everything is there. UserError names the image that cannot
    be read or whose latents are not finite.
    """
    how = how or Filling()
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-cache") as pool:
        parts = [places[i : i + 200] for i in range(0, len(places), 200)]
        keys = [key for part in pool.map(lambda part: [names.key(place) for place in part], parts) for key in part]
        wanted = dict(zip(keys, places, strict=True))
        if how.use:
            remember(how.use, [*wanted, *{names.hashes.key(place.picture) for place in places}])

        def write(batch: Sequence[tuple[bytes, Place]], latents: Tensor) -> None:
            for (key, place), one in zip(batch, stored(latents, names.dtype), strict=True):
                if not torch.isfinite(one).all():
                    raise not_finite([place.picture])
                cache.put(key, {LATENTS: one})

        def make(missing: Sequence[bytes]) -> Iterator[int]:
            with ThreadPoolExecutor(1, thread_name_prefix="sfumato-write") as writer:
                before: Future[None] | None = None
                for batch, pixels in decoded(same_size(missing, wanted, batch_size), pool, workers):
                    latents = encode(pixels, [seed_of_entry(key) for key, _ in batch])
                    if before is not None:
                        before.result()  # raises what went wrong; at most one batch waits to be written
                    before = writer.submit(write, batch, latents)
                    yield len(batch)
                if before is not None:
                    before.result()

        return share_work(cache, list(wanted), make, how)


def not_finite(pictures: Sequence[Picture]) -> UserError:
    """What to say of pictures of which the autoencoder makes nothing that is finite, in float32 neither."""
    names = ", ".join(picture.path for picture in pictures[:4]) or "a picture"
    return UserError(
        f"the latents of {names} are not finite, in float32 neither",
        fix="the autoencoder is damaged or another model's; --vae names one to use in its place",
    )


def fill_text(
    cache: TensorCache,
    names: TextNames,
    captions: Sequence[str],
    encode: EncodeText,
    *,
    batch_size: int = 1,
    how: Filling | None = None,
) -> Counts:
    """Encode the missing captions, by default each on its own, so that nothing depends on its neighbours.

    Work is shared as above.
    """
    how = how or Filling()
    wanted = {names.key(caption): caption for caption in captions}
    if how.use:
        remember(how.use, list(wanted))

    def make(missing: Sequence[bytes]) -> Iterator[int]:
        for start in range(0, len(missing), batch_size):
            keys = missing[start : start + batch_size]
            for key, features in zip(keys, encode([wanted[key] for key in keys]), strict=True):
                cache.put(key, {name: stored(tensor, names.dtype) for name, tensor in features.items()})
            yield len(keys)

    return share_work(cache, list(wanted), make, how)


def share_work(
    cache: TensorCache, keys: Sequence[bytes], make: Callable[[Sequence[bytes]], Iterator[int]], how: Filling
) -> Counts:
    """Make the missing entries, each process those that its rank falls to, and wait until the others have made theirs.

    Waiting looks at the store itself, so no collective call can time out; what a dead process owes is made here.
    Processes that share a store all read every entry where it is checked, so that each knows what is to be made anew.
    """
    keys = [key for key in keys if falls_to(key[:4], how.machine, how.machines)]
    if how.check:
        cache.store.check(keys)
    missing = cache.missing(keys)
    alone = how.processes == 1 or not cache.store.shared
    mine = missing if alone else [key for key in missing if falls_to(key[-4:], how.rank, how.processes)]
    encoded = counted(make(mine), len(mine), how.progress)
    left = [] if alone else absent(cache, missing)
    patience = time.monotonic() + PATIENCE
    while left:
        if time.monotonic() > patience:
            encoded += counted(make(left), len(left), how.progress)
            break
        time.sleep(0.1)
        before, left = len(left), absent(cache, left)
        if len(left) < before:
            patience = time.monotonic() + PATIENCE
    cache.store.flush()
    return Counts(found=len(keys) - len(missing), encoded=encoded)


def falls_to(bits: bytes, part: int, parts: int) -> bool:
    return int.from_bytes(bits, "little") % parts == part


def absent(cache: TensorCache, keys: Sequence[bytes]) -> list[bytes]:
    """What is missing after a look at what other processes have put."""
    cache.store.refresh()
    return cache.missing(keys)


def counted(work: Iterator[int], total: int, progress: Progress | None) -> int:
    """Run the work and report it; the number of entries made."""
    done = 0
    for more in work:
        done += more
        if progress is not None:
            progress(done, total)
    return done


def same_size(
    keys: Sequence[bytes], places: Mapping[bytes, Place], batch_size: int
) -> Iterator[list[tuple[bytes, Place]]]:
    """Batches of one bucket each; only the last of a bucket is short."""
    by_bucket: defaultdict[Size, list[tuple[bytes, Place]]] = defaultdict(list)
    for key in keys:
        by_bucket[places[key].transform.bucket].append((key, places[key]))
    for size in sorted(by_bucket):
        group = by_bucket[size]
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def decoded(
    batches: Iterator[list[tuple[bytes, Place]]], pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[list[tuple[bytes, Place]], Tensor]]:
    """Each batch with its pixels; at least the next two are decoded meanwhile, in the order given."""
    waiting: deque[tuple[list[tuple[bytes, Place]], Future[Tensor]]] = deque()
    while True:
        pending = sum(len(batch) for batch, _ in waiting)
        while len(waiting) < 3 or pending < 2 * max(workers, 1):
            batch = next(batches, None)
            if batch is None:
                break
            parts = [pool.submit(place.pixels) for _, place in batch]
            waiting.append((batch, pool.submit(joined, parts)))  # begun after its parts were, so they never wait for it
            pending += len(batch)
        if not waiting:
            return
        batch, pixels = waiting.popleft()
        yield batch, pixels.result()


def joined(parts: Sequence[Future[Pixels]]) -> Tensor:
    return to_tensor([part.result() for part in parts])


def stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, in the dtype that is kept; whole numbers and masks stay what they are."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wanted)


class TensorCache:
    """Named tensors in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def get(self, key: bytes) -> Tensors | None:
        """The entry's tensors, on the CPU; None where it is missing or damaged."""
        content = self.store.get(key)
        return None if content is None else load(content)

    def put(self, key: bytes, tensors: Tensors) -> None:
        # clones, since a view would be written with all that it is a view of
        self.store.put(
            key, save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
        )

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        return self.store.missing(keys)


class ContentHashes:
    """Content hashes of image files, remembered in a store by path, size and modification time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: dict[tuple[str, int, int], bytes] = {}

    def key(self, picture: Picture) -> bytes:
        """The name under which the hash is remembered."""
        return key_of("content", picture.path, str(picture.bytes), str(picture.mtime_ns))

    def of(self, picture: Picture) -> bytes:
        """UserError where the file cannot be read."""
        facts = (picture.path, picture.bytes, picture.mtime_ns)
        if facts not in self._known:
            name = self.key(picture)
            remembered = self.store.get(name)
            if remembered is None:
                remembered = content_hash(picture.read())
                if picture.is_unchanged():
                    self.store.put(name, remembered)
            self._known[facts] = remembered
        return self._known[facts]


@dataclass(frozen=True, kw_only=True)
class LatentNames:
    """Names latents: what they depend on besides the image."""

    fingerprint: str  # of the encoder: its weights and whatever changes its output
    dtype: torch.dtype  # they are kept in
    hashes: ContentHashes

    def key(self, place: Place, data: bytes | None = None) -> bytes:
        """data: the file's bytes where they are at hand, so that it need not be read again."""
        content = self.hashes.of(place.picture) if data is None else content_hash(data)
        return key_of(LATENTS, self.fingerprint, str(self.dtype), place.transform.name(place.picture.size), content)


@dataclass(frozen=True, kw_only=True)
class TextNames:
    """Names the features of one text encoder."""

    fingerprint: str
    dtype: torch.dtype | None = None  # floating features are kept in; None for the encoder's own

    def key(self, caption: str) -> bytes:
        return key_of("text", self.fingerprint, str(self.dtype), caption)


class Place(NamedTuple):
    """One image as one bucket sees it."""

    picture: Picture
    transform: Transform

    def pixels(self, data: bytes | None = None) -> Pixels:
        """uint8 (H, W, 3); UserError names the file where it is damaged."""
        data = self.picture.read() if data is None else data
        return prepare(data, self.transform, size=self.picture.size, path=self.picture.path)

    def pixels_with_alpha(self, data: bytes) -> tuple[Pixels, Plane]:
        """The same with the alpha channel, uint8 (H, W)."""
        return prepare_with_alpha(data, self.transform, size=self.picture.size, path=self.picture.path)


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How the work of filling is shared, checked and told. Machines share no store and do not wait for each other."""

    rank: int = 0
    processes: int = 1  # of one machine, or of several with a common store
    machine: int = 0
    machines: int = 1
    check: bool = False  # whether what is there is read once, and made anew where it is damaged
    use: Use | None = None  # what the entries are for, remembered so that pruning keeps them
    progress: Progress | None = None


class Counts(NamedTuple):
    """What filling a cache did."""

    found: int  # entries that were there
    encoded: int  # entries made by this process
