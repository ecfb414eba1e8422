"""The data loader: batches of tensors, prefetched by threads; the result does not depend on their number."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sfumato.common.seeds import python_random
from sfumato.config.concepts import Concept
from sfumato.data.augment import compute_size_conditioning
from sfumato.data.batch import CONTROL, INPAINT, Batch, Extras, Sizes
from sfumato.data.batch_sampler import BatchSampler, PlannedBatch, PlannedStep, Sample, ValidationSampler
from sfumato.data.buckets import Size
from sfumato.data.cache.entries import CacheItem, to_tensor
from sfumato.data.caches import Caches, LoadedImage
from sfumato.data.captions import process_caption
from sfumato.data.images import Pixels, Transform
from sfumato.data.masks import find_mask
from sfumato.data.references import fit_control, fit_references, stack_images, stack_references
from sfumato.data.substitutes import SubstituteFinder
from sfumato.data.variants import choose_variant
from sfumato.errors import UserError

log = logging.getLogger(__name__)
_T = TypeVar("_T")
MAX_CROPPED = 3  # by this factor an image may be larger than the crop that dynamic_crops pretends


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How samples are made of images and captions, and by whom."""

    max_train_steps: int
    variants: int = 0  # cached variants of a caption; 0 to process captions at every step
    text_dropout: Mapping[str, float] = field(default_factory=dict)  # text encoder -> its dropout probability
    reference_dropout: float = 0.0  # probability that a sample goes without its reference images
    control_latents: bool = False  # whether control images are latents, which are cached like references
    workers: int = 2  # prefetching threads; 0 prepares each batch when it is asked for
    skip_bad_images: bool = False  # another image takes the place of one that can no longer be read


class Loader:
    """The batches of one process. caches: whatever is not cached is decoded, and its text is not encoded here."""

    def __init__(self, sampler: BatchSampler | ValidationSampler, caches: Caches, settings: LoaderSettings) -> None:
        self.sampler = sampler
        self.plan = sampler.plan
        self.caches = caches
        self.settings = settings
        self._substitutes = SubstituteFinder()

    def steps(self, first_step: int = 0, finish: Callable[[Batch], Batch] | None = None) -> Iterator[Step]:
        """The sampler's steps from `first_step` (counted from 0) on; UserError if an image is damaged.

        finish: what else is done to each batch, in the threads. They end when the iterator is closed or an error is
        raised.
        """
        planned = self.sampler.steps(first_step)

        def make(step: PlannedStep, batch: PlannedBatch) -> Batch:
            made = self._make_batch(step, batch)
            return finish(made) if finish else made

        workers = self.settings.workers
        if workers == 0:
            for step in planned:
                yield make_step(step, [make(step, batch) for batch in step.batches])
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="sfumato-loader")
        try:
            prefetched: deque[tuple[PlannedStep, list[Future[Batch]]]] = deque()
            while True:
                while sum(len(futures) for _, futures in prefetched) < 2 * workers:
                    step = next(planned, None)
                    if step is None:
                        break
                    prefetched.append((step, [pool.submit(make, step, batch) for batch in step.batches]))
                if not prefetched:
                    return
                step, futures = prefetched.popleft()
                yield make_step(step, [future.result() for future in futures])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _make_batch(self, step: PlannedStep, batch: PlannedBatch) -> Batch:
        samples = [self._prepare_sample(step, batch, sample) for sample in batch.samples]
        strength = batch.dataset.settings.network_multiplier
        multiplier = torch.full((len(samples),), strength) if self.plan.has_multipliers else None
        captions = [sample.caption for sample in samples]
        latents = require_all_or_none([sample.image.latents for sample in samples])
        pixels = require_all_or_none([sample.image.pixels for sample in samples])
        preserved = [sample.subset.settings.preserved for sample in batch.samples]
        offsets = [sample.subset.settings.timestep_offset for sample in batch.samples]
        controls = require_all_or_none([sample.control for sample in samples])
        images = {CONTROL: stack_images(controls)} if controls else {}
        painted = require_all_or_none([sample.image.painted for sample in samples])
        images |= {INPAINT: stack_images(painted)} if painted else {}
        return Batch(
            ids=torch.tensor([sample.id for sample in batch.samples]),
            latents=torch.stack(latents) if latents else None,
            pixels=to_tensor(pixels) if pixels else None,
            captions=captions,
            text={name: features.load_stacked(captions) for name, features in self.caches.text.items()},
            text_dropped={name: self._draw_text_dropout(name, batch.samples) for name in self.settings.text_dropout},
            sizes=Sizes(
                original=torch.tensor([sample.original for sample in samples]),
                crop=torch.tensor([sample.crop for sample in samples]),
                target=torch.tensor([batch.bucket[::-1]] * len(samples)),
            ),
            extras=Extras(
                multiplier=multiplier, images={**images, **stack_references([each.references for each in samples])}
            ),
            weight=torch.tensor([self._choose_weight(*pair) for pair in zip(batch.samples, samples, strict=True)]),
            entry_seeds=torch.tensor([sample.image.entry_seed for sample in samples]),
            mask=stack_masks([sample.image.mask for sample in samples]),
            preserve=torch.tensor(preserved) if any(preserved) else None,
            image_numbers=torch.tensor([sample.image_number for sample in samples]),
            concepts=require_all_or_none([sample.subset.settings.concept for sample in batch.samples]) or None,
            timestep_offset=torch.tensor(offsets, dtype=torch.float64) if any(offsets) else None,
        )

    def _draw_text_dropout(self, name: str, samples: Sequence[Sample]) -> Tensor:
        """Whether each sample drops the output of this text encoder, (B,) bool."""
        seed, probability = self.sampler.seed, self.settings.text_dropout[name]
        draws = [python_random(seed, f"{name} dropout", sample.id).random() for sample in samples]
        return torch.tensor([draw < probability for draw in draws])

    def _choose_weight(self, sample: Sample, prepared: PreparedSample) -> float:
        if not sample.real or prepared.is_empty:
            return 0.0
        if sample.subset.settings.concept is not None:
            return sample.subset.settings.concept.weight
        return self.plan.prior_loss_weight if sample.subset.settings.is_reg else 1.0

    def _prepare_sample(self, step: PlannedStep, batch: PlannedBatch, sample: Sample) -> PreparedSample:
        """Load one sample, or another one in its place."""
        try:
            return self._load_sample(step, sample)
        except UserError as error:
            if not self.settings.skip_bad_images or error.code == "cache-entry-unreadable":
                raise
            other = self._substitutes.load_other(
                sample, batch.bucket, lambda other: self._load_sample(step, other), error
            )
            return other or self._make_empty_sample(step, batch, sample)

    def _load_sample(self, step: PlannedStep, sample: Sample) -> PreparedSample:
        """Everything random is a function of the seed and the sample's id."""
        item, seed = sample.item, self.sampler.seed
        if sample.subset.settings.concept is not None:
            return self._make_prompt(step, sample, sample.subset.settings.concept)
        rules = sample.subset.settings.images
        transform = item.draw_transform(rules, lambda purpose: python_random(seed, purpose, sample.id))
        image_item, mask_item = CacheItem(item.image, transform), find_mask(item, rules, transform)
        original, crop = compute_size_conditioning(item.size, transform, full_size=rules.full_size)
        return PreparedSample(
            caption=self._make_caption(step, sample),
            image=self.caches.read_image(image_item, mask_item),
            control=self._load_control(sample, transform),
            references=self._load_references(sample, transform),
            original=original,
            crop=crop,
            image_number=sample.image_number,
        )

    def _make_prompt(self, step: PlannedStep, sample: Sample, concept: Concept) -> PreparedSample:
        """A sample without an image. With dynamic_crops it is conditioned on a random crop of a larger one."""
        width, height = sample.item.size
        original, crop = (height, width), (0, 0)
        if concept.dynamic_crops:
            rng = python_random(self.sampler.seed, "crops", sample.id)
            scale = rng.uniform(1, MAX_CROPPED)
            original = int(height * scale), int(width * scale)
            crop = rng.randint(0, original[0] - height), rng.randint(0, original[1] - width)
        return PreparedSample(
            caption=self._make_caption(step, sample),
            image=LoadedImage(entry_seed=sample.id),
            control=None,
            original=original,
            crop=crop,
        )

    def _load_references(self, sample: Sample, transform: Transform) -> list[Tensor | Pixels | None]:
        """Latents (C, h, w) or pixels; None for each where the sample drops them."""
        items = fit_references(sample.item, sample.subset.settings.images, transform)
        draw = python_random(self.sampler.seed, "reference dropout", sample.id).random()
        if draw < self.settings.reference_dropout or not items:
            return [None] * len(items)
        return [self.caches.read_partner(item) for item in items]

    def _load_control(self, sample: Sample, transform: Transform) -> Tensor | Pixels | None:
        """Pixels; latents where the method takes these and they are cached."""
        item = fit_control(sample.item, sample.subset.settings.images, transform)
        if item is None:
            return None
        return self.caches.read_partner(item) if self.settings.control_latents else item.read_pixels()

    def _make_empty_sample(self, step: PlannedStep, batch: PlannedBatch, sample: Sample) -> PreparedSample:
        """Gray, with weight 0: where no other image has the size of the batch."""
        width, height = batch.bucket
        gray = np.full((height, width, 3), 128, np.uint8)
        has_control = sample.item.conditioning is not None and not sample.subset.settings.images.masked_loss
        return PreparedSample(
            caption=self._make_caption(step, sample),
            image=LoadedImage(entry_seed=sample.id, pixels=gray),
            control=gray if has_control else None,
            original=(height, width),
            crop=(0, 0),
            is_empty=True,
        )

    def _make_caption(self, step: PlannedStep, sample: Sample) -> str:
        """A function of the seed and the sample's id, and with token_warmup_step also of the step."""
        text, rules, seed = sample.item.image.caption, sample.subset.settings.rules, self.sampler.seed
        variants = self.settings.variants
        if variants:
            return choose_variant(text, rules, variants=variants, seed=seed, sample=sample.id, epoch=step.epoch + 1)
        return process_caption(
            text,
            rules,
            python_random(seed, "caption", sample.id),
            epoch=step.epoch + 1,
            step=step.index,
            max_train_steps=self.settings.max_train_steps,
        )


def stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """(B, 1, h, w), all ones for a sample without a mask; None if no sample has one."""
    shape = next((mask.shape for mask in masks if mask is not None), None)
    return None if shape is None else torch.stack([torch.ones(shape) if mask is None else mask for mask in masks])


def require_all_or_none(values: Sequence[_T | None]) -> list[_T]:
    """The values if all are present, an empty list if all are None; a mixture is a bug."""
    present = [value for value in values if value is not None]
    assert len(present) in (0, len(values)), "samples of two kinds in one batch"
    return present


def make_step(step: PlannedStep, batches: Sequence[Batch]) -> Step:
    return Step(index=step.index, epoch=step.epoch, batches=tuple(batches), real_samples=step.real_samples)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of one process."""

    index: int  # from 0
    epoch: int  # from 0
    batches: tuple[Batch, ...]  # of this process, one for each micro-step
    real_samples: int  # of all processes and micro-steps, without padding samples


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """One sample, before it is stacked with the others of its batch."""

    caption: str
    image: LoadedImage
    control: Tensor | Pixels | None
    original: Size  # height, width
    crop: Size  # top, left
    references: Sequence[Tensor | Pixels | None] = ()
    is_empty: bool = False
    image_number: int = -1  # -1 for a prompt, and where another image stands in
