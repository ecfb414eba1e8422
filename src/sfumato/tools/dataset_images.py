"""The images on the page of `sfumato dataset inspect`: cropped to their buckets, and the first samples of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sfumato.config import Config
from sfumato.data.augment import ImageRules
from sfumato.data.batch import Batch
from sfumato.data.batch_sampler import BatchSampler
from sfumato.data.cache.entries import CacheItem, ContentHashes, LatentKeys
from sfumato.data.cache.store import MemoryStore
from sfumato.data.caches import Caches
from sfumato.data.find.inspect import SubsetInspection
from sfumato.data.images import Transform
from sfumato.data.loader import Loader, LoaderSettings
from sfumato.data.masks import MaskKeys, find_mask
from sfumato.data.plans import DataPlan, Item, SubsetPlan
from sfumato.data.references import fit_control, fit_references
from sfumato.plan import count_steps
from sfumato.tools.dataset_page import PageImage

NUM_FIRST_SAMPLES = 16
MASK_DOWNSCALE = 8  # pixels a side of a latent pixel
HIDDEN_BRIGHTNESS = 0.25  # of pixels that a mask hides from the loss


def make_page_images(subset: SubsetInspection, count: int) -> Iterator[PageImage]:
    """`count` images at equal distances in the subset, cropped to their buckets."""
    items = [item for item in subset.plan.items if item.image.path not in subset.damaged]
    count = min(count, len(items))
    for i in range(count):
        item = items[i * len(items) // count]
        (width, height), (bucket_width, bucket_height) = item.size, item.choice.bucket
        yield PageImage(
            image=crop_to_bucket(item, subset.plan),
            title=Path(item.image.path).name,
            facts=f"{width}×{height} → {bucket_width}×{bucket_height}",
            caption=item.image.caption,
        )


def crop_to_bucket(item: Item, subset: SubsetPlan) -> Image.Image:
    """The image in its bucket after its control and reference images, darkened where a mask hides it from the loss."""
    rules = subset.settings.images
    transform = item.center_transform(rules)
    pixels = CacheItem(item.image, transform).read_pixels()
    mask = find_mask(item, rules, transform)
    image = Image.fromarray(pixels) if mask is None else darken_masked(pixels, mask.read() / 255)
    return put_side_by_side([*crop_partners(item, rules, transform), image])


def crop_partners(item: Item, rules: ImageRules, transform: Transform) -> list[Image.Image]:
    """The control image of an image, and its reference images."""
    control = fit_control(item, rules, transform)
    partners = [*([control] if control else []), *fit_references(item, rules, transform)]
    return [Image.fromarray(partner.read_pixels()) for partner in partners]


def put_side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size from left to right."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    return row


def darken_masked(pixels: NDArray[Any], mask: NDArray[Any]) -> Image.Image:
    """pixels (H, W, 3) of 0 to 255, mask (H, W) in [0, 1]; where it is 0 a quarter of the brightness is left."""
    brightness = HIDDEN_BRIGHTNESS + (1 - HIDDEN_BRIGHTNESS) * mask[..., None]
    return Image.fromarray(np.rint(pixels * brightness).astype(np.uint8))


def load_first_samples(config: Config, plan: DataPlan) -> list[PageImage]:
    """The samples of the first steps: the loader's own batches, with captions as they will be encoded."""
    assert config.loop.seed is not None
    cached = config.cache.cache_text_encoder_outputs
    keys = LatentKeys(fingerprint="none", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))
    settings = LoaderSettings(
        max_train_steps=max(count_steps(config, plan), 1),
        variants=config.cache.text_cache_variants if cached else 0,
        workers=0,
    )
    loader = Loader(
        BatchSampler(plan, seed=config.loop.seed, accumulation=config.loop.gradient_accumulation_steps),
        Caches(latent_keys=keys, mask_keys=MaskKeys(downscale=MASK_DOWNSCALE, hashes=keys.hashes)),
        settings,
    )
    return list(islice(iterate_samples(loader), NUM_FIRST_SAMPLES))


def iterate_samples(loader: Loader) -> Iterator[PageImage]:
    """Every sample of the loader's batches, in order."""
    for step, planned in zip(loader.steps(), loader.sampler.steps(), strict=False):
        for batch, planned_batch in zip(step.batches, planned.batches, strict=True):
            for i, sample in enumerate(planned_batch.samples):
                yield PageImage(
                    image=to_image(batch, i),
                    title=f"{Path(sample.item.image.path).name}, step {step.index + 1}",
                    facts=describe_sizes(batch, i),
                    caption=batch.captions[i],
                )


def to_image(batch: Batch, i: int) -> Image.Image:
    """The pixels of a sample after those of its references, with its mask at the resolution that the loss uses."""
    assert batch.pixels is not None
    pixels = to_levels(batch.pixels[i])
    height, width = pixels.shape[:2]
    mask = np.ones((height, width))
    if batch.mask is not None:
        coarse = batch.mask[i, 0].numpy()
        mask = coarse.repeat(height // coarse.shape[0], 0).repeat(width // coarse.shape[1], 1)
    beside = [each.pixels[i] for each in batch.extras.images.values() if each.pixels is not None]
    return put_side_by_side([*map(Image.fromarray, map(to_levels, beside)), darken_masked(pixels, mask)])


def to_levels(pixels: Tensor) -> NDArray[Any]:
    """(3, H, W) in [-1, 1] -> uint8 (H, W, 3)."""
    return np.rint(((pixels + 1) * 127.5).permute(1, 2, 0).numpy()).astype(np.uint8)


def describe_sizes(batch: Batch, i: int) -> str:
    """A sample's weight and its size conditioning, height first, as the models get it."""
    sizes = batch.sizes
    original, crop, target = (format_pair(pairs[i]) for pairs in (sizes.original, sizes.crop, sizes.target))
    return f"weight {float(batch.weight[i]):g}, size {original}, crop {crop}, target {target}"


def format_pair(pair: Tensor) -> str:
    """512×768"""
    return "×".join(str(int(number)) for number in pair)
