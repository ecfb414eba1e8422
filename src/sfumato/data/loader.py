"""From the order of samples to batches of tensors, prepared ahead by threads; the same for any number of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.common.seeds import python_random
from sfumato.data.augment import size_conditioning
from sfumato.data.batch import Batch, Extras, Sizes, Tensors, pad_stack
from sfumato.data.buckets import Size
from sfumato.data.cache.entries import LATENTS, LatentNames, Place, TensorCache, TextNames, seed_of_entry, to_tensor
from sfumato.data.captions import process
from sfumato.data.images import Pixels
from sfumato.data.masks import MASK, MaskNames, MaskPlace, mask_of, reduced
from sfumato.data.order import HeldOut, Order, PlannedBatch, PlannedStep, Sample
from sfumato.data.variants import chosen
from sfumato.errors import UserError

T = TypeVar("T")


class Loader:
    """Batches of one process.

    latents: where cached latents lie; without it batches carry pixels. names: by which entries are named, needed for
    the seeds of the posterior's noise in both cases. masks: the same for masks, which lie beside cached latents.
    text: features of the encoders whose output is cached; variants: how many captions of each were cached where options
    change them, 0 to make a new one at every step.
    text_dropout: text encoder -> chance of a sample to do without it.
    workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
    """

    def __init__(
        self,
        order: Order | HeldOut,
        *,
        names: LatentNames,
        masks: MaskNames,
        max_train_steps: int,
        latents: TensorCache | None = None,
        text: Mapping[str, TextFeatures] | None = None,
        variants: int = 0,
        text_dropout: Mapping[str, float] | None = None,
        workers: int = 2,
    ) -> None:
        self.order = order
        self.plan = order.plan
        self.names = names
        self.masks = masks
        self.max_train_steps = max_train_steps
        self.latents = latents
        self.text = dict(text or {})
        self.variants = variants
        self.text_dropout = dict(text_dropout or {})
        self.workers = workers

    def steps(self, first_step: int = 0) -> Iterator[Step]:
        """The steps of the order from `first_step` (counted from 0) on; UserError names an image that is damaged.

        Closing the iterator, or an error, ends the threads.
        """
        planned = self.order.steps(first_step)
        if self.workers == 0:
            for step in planned:
                yield step_of(step, [self._batch(step, batch) for batch in step.batches])
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="sfumato-loader")
        try:
            waiting: deque[tuple[PlannedStep, list[Future[Batch]]]] = deque()
            while True:
                while sum(len(futures) for _, futures in waiting) < 2 * self.workers:
                    step = next(planned, None)
                    if step is None:
                        break
                    waiting.append((step, [pool.submit(self._batch, step, batch) for batch in step.batches]))
                if not waiting:
                    return
                step, futures = waiting.popleft()
                yield step_of(step, [future.result() for future in futures])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, step: PlannedStep, batch: PlannedBatch) -> Batch:
        samples = [self._prepared(step, batch, sample) for sample in batch.samples]
        strength = batch.dataset.settings.network_multiplier
        multiplier = torch.full((len(samples),), strength) if self.plan.multipliers else None
        captions = [sample.caption for sample in samples]
        latents = all_or_none([sample.shown.latents for sample in samples])
        pixels = all_or_none([sample.shown.pixels for sample in samples])
        preserved = [sample.subset.settings.preserved for sample in batch.samples]
        controls = all_or_none([sample.control for sample in samples])
        return Batch(
            ids=torch.tensor([sample.id for sample in batch.samples]),
            latents=torch.stack(latents) if latents else None,
            pixels=to_tensor(pixels) if pixels else None,
            captions=captions,
            text={name: features.stacked(captions) for name, features in self.text.items()},
            text_dropped={
                name: torch.tensor([self._drops(name, rate, sample.id) for sample in batch.samples])
                for name, rate in self.text_dropout.items()
            },
            sizes=Sizes(
                original=torch.tensor([sample.original for sample in samples]),
                crop=torch.tensor([sample.crop for sample in samples]),
                target=torch.tensor([batch.bucket[::-1]] * len(samples)),
            ),
            extras=Extras(multiplier=multiplier, control=to_tensor(controls) if controls else None),
            weight=torch.tensor([self._weight(sample) for sample in batch.samples]),
            entry_seeds=torch.tensor([sample.shown.entry_seed for sample in samples]),
            mask=filled([sample.shown.mask for sample in samples]),
            preserve=torch.tensor(preserved) if any(preserved) else None,
        )

    def _drops(self, name: str, rate: float, sample_id: int) -> bool:
        return python_random(self.order.seed, f"{name} dropout", sample_id).random() < rate

    def _weight(self, sample: Sample) -> float:
        if not sample.real:
            return 0.0
        return self.plan.prior_loss_weight if sample.subset.settings.is_reg else 1.0

    def _prepared(self, step: PlannedStep, batch: PlannedBatch, sample: Sample) -> Prepared:
        """Everything random here is a function of the seed and the sample's id."""
        settings, item, seed = sample.subset.settings, sample.item, self.order.seed
        rules = settings.images
        transform = item.drawn(rules, lambda purpose: python_random(seed, purpose, sample.id))
        place, masked = Place(item.picture, transform), mask_of(item, rules, transform)
        shown = self._cached(place, masked) if self.latents else self._decoded(place, masked)
        original, crop = size_conditioning(item.size, transform, whole_size=rules.whole_size)
        control = None if rules.masked_loss or item.conditioning is None else item.conditioning
        return Prepared(
            caption=self._caption(step, sample),
            shown=shown,
            control=None if control is None else Place(control, transform.geometry).pixels(),
            original=original,
            crop=crop,
        )

    def _caption(self, step: PlannedStep, sample: Sample) -> str:
        """A function of the seed and the sample's id, and of the step where the caption warms up."""
        text, rules, seed = sample.item.picture.caption, sample.subset.settings.rules, self.order.seed
        if self.variants:
            return chosen(text, rules, variants=self.variants, seed=seed, sample=sample.id, epoch=step.epoch + 1)
        return process(
            text,
            rules,
            python_random(seed, "caption", sample.id),
            epoch=step.epoch + 1,
            step=step.index,
            max_train_steps=self.max_train_steps,
        )

    def _cached(self, place: Place, masked: MaskPlace | None) -> Shown:
        assert self.latents is not None
        key = self.names.key(place)
        mask = None
        if masked is not None:
            mask = found(self.latents, self.masks.key(masked), f"mask of {masked.picture.path}")[MASK]
        latents = found(self.latents, key, f"latents of {place.picture.path}")[LATENTS]
        return Shown(latents=latents, mask=mask, entry_seed=seed_of_entry(key))

    def _decoded(self, place: Place, masked: MaskPlace | None) -> Shown:
        data = place.picture.read()
        if masked is not None and masked.channel == "alpha":  # one decoding for both
            pixels, plane = place.pixels_with_alpha(data)
        else:
            pixels, plane = place.pixels(data), None if masked is None else masked.plane()
        mask = None if plane is None else reduced(plane, self.masks.downscale)
        return Shown(pixels=pixels, mask=mask, entry_seed=seed_of_entry(self.names.key(place, data)))


def found(cache: TensorCache, key: bytes, what: str) -> Tensors:
    tensors = cache.get(key)
    if tensors is None:
        raise UserError(f"the cached {what} cannot be read any more", fix="start again; they are made anew")
    return tensors


def filled(masks: Sequence[Tensor | None]) -> Tensor | None:
    """(B, 1, h, w) where any sample has a mask; all of a sample without one counts."""
    shape = next((mask.shape for mask in masks if mask is not None), None)
    return None if shape is None else torch.stack([torch.ones(shape) if mask is None else mask for mask in masks])


def all_or_none(values: Sequence[T | None]) -> list[T]:
    """A batch is cached whole or not at all, and control images belong to every picture of a plan or to none."""
    present = [each for each in values if each is not None]
    assert len(present) in (0, len(values)), "samples of two kinds in one batch"
    return present


def step_of(step: PlannedStep, batches: Sequence[Batch]) -> Step:
    return Step(index=step.index, epoch=step.epoch, batches=tuple(batches), real_samples=step.real_samples)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of one process."""

    index: int  # steps before it, from 0
    epoch: int  # from 0
    batches: tuple[Batch, ...]  # this process's, one for each micro-step
    real_samples: int  # of all processes and micro-steps; copies that fill up a batch do not count


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """The cached output of one text encoder. `rewrite`: what the training method makes of a caption beforehand."""

    cache: TensorCache
    names: TextNames
    rewrite: Callable[[str], str] = str

    def stacked(self, captions: Sequence[str]) -> Tensors:
        """Each feature of the captions, padded to the longest; UserError where one is missing."""
        each = [self._of(caption) for caption in captions]
        return {name: pad_stack([features[name] for features in each]) for name in each[0]}

    def _of(self, caption: str) -> Tensors:
        features = self.cache.get(self.names.key(self.rewrite(caption)))
        if features is None:
            fix = "start again; they are made anew"
            raise UserError(f"the cached text features of {caption[:60]!r} cannot be read", fix=fix)
        return features


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture, cached or decoded, and its mask."""

    entry_seed: int
    latents: Tensor | None = None
    pixels: Pixels | None = None
    mask: Tensor | None = None  # (1, h, w)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One sample, before it is stacked with the others of its batch."""

    caption: str
    shown: Shown
    control: Pixels | None
    original: Size  # height, width
    crop: Size  # top, left
