"""Loaders for tests: a dataset file with all kinds of subsets, encoders as plain functions."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from itertools import islice
from pathlib import Path

import torch

from sfumato.data.batch_sampler import BatchSampler
from sfumato.data.cache.entries import ContentHashes, LatentKeys, TensorCache
from sfumato.data.cache.filling import fill_latents, list_latent_items
from sfumato.data.cache.store import MemoryStore
from sfumato.data.caches import Caches
from sfumato.data.loader import Loader, LoaderSettings
from sfumato.data.masks import MaskKeys

SUBSET = "[[datasets.subsets]]\nimage_dir = '{root}/"


RICH = f"""
[general]
enable_bucket = true
resolution = 128
min_bucket_reso = 64
max_bucket_reso = 256
batch_size = 2
caption_extension = ".txt"
[[datasets]]
{SUBSET}a'
num_repeats = 2
flip_aug = true
shuffle_caption = true
caption_dropout_rate = 0.2
{SUBSET}b'
caption_tag_dropout_rate = 0.3
caption_prefix = "photo,"
{SUBSET}reg'
is_reg = true
class_tokens = "thing"
[[datasets]]
resolution = 64
{SUBSET}a'
"""


def encode(pixels, seeds):
    noise = torch.stack([torch.randn(1, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return torch.nn.functional.avg_pool2d(pixels, 8) + noise[:, :, None, None]


def features(captions):
    found = []
    for caption in captions:
        seed = int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=7).digest(), "little")
        found.append({"hidden": torch.randn(len(caption) % 7 + 1, 3, generator=torch.Generator().manual_seed(seed))})
    return found


def make_loader(plan, *, rank=0, cached=False, text=None, seed=7, accumulation=2, **settings) -> Loader:
    """settings: of LoaderSettings; by default no threads."""
    store = MemoryStore()
    caches = make_caches(store, text=text)
    if cached:
        caches.latents = TensorCache(store)
        fill_latents(caches.latents, caches.latent_keys, list_latent_items(plan), encode, batch_size=3)
    order = BatchSampler(plan, seed=seed, accumulation=accumulation, rank=rank)
    return Loader(order, caches, LoaderSettings(**{"max_train_steps": 100, "workers": 0, **settings}))


def make_caches(store: MemoryStore | None = None, *, downscale=8, text=None) -> Caches:
    """Empty ones of a model with the given downscale; text: features by encoder."""
    keys = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store or MemoryStore()))
    masks = MaskKeys(downscale=downscale, hashes=keys.hashes)
    return Caches(latent_keys=keys, mask_keys=masks, text=text or {})


def to_plain_data(value: object) -> object:
    """A batch as plain data, for comparing bit by bit."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {name: to_plain_data(each) for name, each in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: to_plain_data(vars(value)[field.name]) for field in fields(value)}  # pyright: ignore
    return tuple(map(to_plain_data, value)) if isinstance(value, list | tuple) else value


def collect_steps(loader: Loader, count: int, first: int = 0) -> list[object]:
    steps = loader.steps(first)
    found = [to_plain_data(step) for step in islice(steps, count)]
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def plan_maker(find, write_images, root: Path):
    """A function from the text of a dataset file to its plan, with images in three folders."""

    def make(text: str = RICH, *argv, **options):
        if not (root / "a").exists():
            write_images(root / "a", 5, size=(80, 64))
            write_images(root / "b", 3, size=(50, 120), seed=1)
            write_images(root / "reg", 2, size=(64, 64), seed=2)
        return find.toml(text, *argv, **options)

    return make
