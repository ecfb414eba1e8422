"""One micro-batch, as the training loop and the methods see it; independent of the model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.config.concepts import Concept

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Size conditioning of every sample, in pixels, each (B, 2); most families ignore it."""

    original: Tensor  # height, width before resizing
    crop: Tensor  # top, left
    target: Tensor  # height, width of the bucket

    @classmethod
    def from_size(cls, batch: int, height: int, width: int) -> Self:
        """For images generated at this size: neither resized nor cropped."""
        size = torch.tensor([[height, width]]).expand(batch, 2)
        return cls(original=size, crop=torch.zeros_like(size), target=size)


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """A further image of every sample, as pixels or as latents; its size need not be the target's."""

    pixels: Tensor | None = None  # (B, 3, H, W) in [-1, 1]
    latents: Tensor | None = None  # (B, C, h, w), scaled and shifted
    present: Tensor | None = None  # (B,) bool, on the CPU: the samples that have it, zeros for the others; None: all
    strength: float = 1.0  # of what it steers
    starts_at: float = 0.0  # the share of the steps after which it takes part, where an image is generated
    ends_at: float = 1.0  # and the share up to which it does

    def map_large(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with the image changed; `present` stays, since the host looks at it."""
        pixels = None if self.pixels is None else change(self.pixels)
        return replace(self, pixels=pixels, latents=None if self.latents is None else change(self.latents))


Images = Mapping[str, ImageInput]  # by role: "control", "reference_1"
CONTROL = "control"
CONTROL_MASK = "control_mask"  # pixels (B, 1, H, W): 1 where a control adapter with a mask fills in the image, else 0
INPAINT = "inpaint"  # latents (B, M + C, h, w): 1 where the model paints, then the image without what is there
_REFERENCE = "reference_"


def name_control(number: int) -> str:
    """The role of what the ControlNet or LLLite of this number reads, counted from 0."""
    return f"{CONTROL}_{number + 1}" if number else CONTROL


def select_active(images: Images, step: int, steps: int) -> Images:
    """Those that take part in a step, counted from 0, as diffusers counts control_guidance_start and _end."""
    return {
        role: image
        for role, image in images.items()
        if image.starts_at <= step / steps and (step + 1) / steps <= image.ends_at
    }


def name_reference(number: int) -> str:
    """The role of a reference image, counted from 0."""
    return f"{_REFERENCE}{number + 1}"


def is_reference(role: str) -> bool:
    return role.startswith(_REFERENCE)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Inputs of some methods and families besides the image and its text; also built by sample.py for previews."""

    multiplier: Tensor | None = None  # (B,) adapter strength
    multipliers: Tensor | None = None  # (B, N) strengths of N adapters, where images are generated with several
    images: Images = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RandomDraws:
    """What is drawn at random for a batch; a function of the seed and the samples' ids alone."""

    t: Tensor  # (B,) in 0 .. 1000, on the CPU
    noise: Tensor  # (B, C, h, w), as the target has it
    input_noise: Tensor | None = None  # as the input has it, where that is another


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch; sample i is independent of the other samples, of the rank and of the batch size."""

    ids: Tensor  # (B,) int64: epoch * epoch_length + position in the epoch's global order
    latents: Tensor | None  # (B, C, h, w), scaled and shifted
    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1] where latents are not cached
    captions: Sequence[str]  # after shuffling and dropout: exactly what is encoded
    text: Mapping[str, Tensors]  # features of the cached encoders only, padded and stacked
    text_dropped: Mapping[str, Tensor]  # encoder name -> (B,) bool, from the dropout rate of each encoder
    sizes: Sizes
    extras: Extras
    weight: Tensor  # (B,) weight in the loss: prior_loss_weight or 1; 0 for a padding sample
    entry_seeds: Tensor  # (B,) int64: seed of the autoencoder posterior's noise, from the cache key
    mask: Tensor | None = None  # (B, 1, h, w) in [0, 1]
    preserve: Tensor | None = None  # (B,) bool: the target is the reference model's prediction; None: for no sample
    timestep_offset: Tensor | None = None  # (B,) float64, towards more noise; None: 0 for every sample
    concepts: Sequence[Concept] | None = None  # what each sample trains in the place of an image
    image_numbers: Tensor | None = None  # (B,) int64: position among the training images; -1 for any other
    draws: RandomDraws | None = None  # None where they are drawn in the step

    def take(self, positions: Tensor) -> Self:
        """The samples at these positions, (N,) int64 on the CPU."""
        return replace(self, **{name: index_batch(value, positions) for name, value in vars(self).items()})

    def map_large(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with latents, text features, noise and further images changed.

        What the host looks at to decide something stays as it is: ids, weights, masks, sizes.
        """
        text = {part: {name: change(tensor) for name, tensor in found.items()} for part, found in self.text.items()}
        draws = self.draws
        images = {role: image.map_large(change) for role, image in self.extras.images.items()}
        if draws is not None:
            other = None if draws.input_noise is None else change(draws.input_noise)
            draws = replace(draws, noise=change(draws.noise), input_noise=other)
        return replace(
            self,
            latents=None if self.latents is None else change(self.latents),
            text=text,
            extras=replace(self.extras, images=images),
            draws=draws,
        )


def index_batch(value: Any, positions: Tensor) -> Any:
    """The value of a batch's field for the samples at these positions, (N,) int64 on the CPU."""
    if isinstance(value, Tensor):
        return value[positions.to(value.device, non_blocking=True)]
    if isinstance(value, Mapping):
        return {name: index_batch(entry, positions) for name, entry in value.items()}
    if isinstance(value, Sizes | Extras | ImageInput | RandomDraws):
        return replace(value, **index_batch(vars(value), positions))
    if value is None or isinstance(value, float):  # one of all samples
        return value
    return [value[position] for position in positions.tolist()]


def pad_stack(items: Sequence[Tensor]) -> Tensor:
    """Stack tensors of unequal shape, padded with zeros (False) at their ends; gradients flow through."""
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) == 1:
        return torch.stack(list(items))
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for item in items:
        padding: list[int] = []  # F.pad wants (before, after) of the last dimension first
        for size, padded_size in zip(reversed(item.shape), reversed(longest), strict=True):
            padding += [0, padded_size - size]
        padded.append(F.pad(item, padding))
    return torch.stack(padded)
