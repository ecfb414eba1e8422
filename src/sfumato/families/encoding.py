"""Latents, images and text features from any family's frozen networks, live or for the cache: bit for bit the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.common.text import plural
from sfumato.data.batch import Tensors, pad_stack
from sfumato.data.prompt_weighting import has_weights, parse_weights, strip_weights
from sfumato.diffusion.objective import LatentSpec
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.part import Part

log = logging.getLogger(__name__)
SMALL_TILE = 512  # pixels a side
HALF_DTYPES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def encode_images(model: Family, pixels: Tensor, seeds: Sequence[int] | None, *, vae_batch_size: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32; each posterior is drawn with its image's own seed.

    seeds: None for the posterior's mode, as diffusers encodes reference images.
    Latents that are not finite even in float32 are returned as they are: callers know the image's name and report it.
    """
    noise = draw_posterior_noise(model.latents, pixels.shape, seeds or [0] * len(pixels))
    noise = noise * 0 if seeds is None else noise

    def encode(rows: Tensor) -> Tensor:
        latents = model.encode_image(pixels[rows], noise[rows])
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    chunks = torch.arange(len(pixels)).split(vae_batch_size)
    return torch.cat([run_vae(model, encode, rows) for rows in chunks])


def encode_inpaint(
    model: Family, pixels: Tensor, masks: Tensor, seeds: Sequence[int] | None, *, vae_batch_size: int
) -> Tensor:
    """(B, 3, H, W) in [-1, 1] and masks (B, 1, H, W), 1 where the model paints -> (B, M + C, h, w) on the device.

    The M channels that the model sees of the mask, then the latents of the image with gray where it paints, as
    diffusers' inpainting pipelines have them.
    """
    return join_inpaint(model, masks, encode_unpainted(model, pixels, masks, seeds, vae_batch_size=vae_batch_size))


def encode_unpainted(
    model: Family, pixels: Tensor, masks: Tensor, seeds: Sequence[int] | None, *, vae_batch_size: int
) -> Tensor:
    """The latents (B, C, h, w) of images with gray where masks (B, 1, H, W) are 1."""
    return encode_images(model, pixels * (masks.to(pixels) < 0.5), seeds, vae_batch_size=vae_batch_size)


def join_inpaint(model: Family, masks: Tensor, latents: Tensor) -> Tensor:
    """What the model sees of masks (B, 1, H, W) and those latents: (B, M + C, h, w)."""
    return torch.cat([model.shrink_mask(masks.to(latents.dtype)).to(latents, non_blocking=True), latents], dim=1)


@torch.no_grad()
def decode_latents(model: Family, latents: Tensor, batch_size: int = 1) -> Tensor:
    """Scaled latents (B, C, h, w) -> (B, 3, H, W) in about [-1, 1], float32; UserError where they are not finite.

    One at a time by default, to save memory, and in tiles where that does not suffice; the autoencoder is loaded for it
    where it is not.
    """
    with model.parts["vae"].hold():
        rows = torch.arange(len(latents)).split(batch_size)
        images = torch.cat([decode_rows(model, latents, row) for row in rows])
    if not torch.isfinite(latents).all():
        raise UserError("the denoiser's latents contain NaN or inf", code="sample-latents-nonfinite")
    if not torch.isfinite(images).all():
        raise UserError("the autoencoder's image contains NaN or inf, even in float32", code="sample-image-nonfinite")
    return images


def decode_rows(model: Family, latents: Tensor, rows: Tensor) -> Tensor:
    """The images of some rows; from the first that does not fit in memory on in tiles, which is reported."""
    is_short = False
    try:
        return run_vae(model, lambda row: model.decode(latents[row]).float(), rows)
    except torch.OutOfMemoryError:
        if model.vae_tile_size:
            raise
        is_short = True
    assert is_short  # the error is gone, and with it the tensors of the calls that it went through
    torch.cuda.empty_cache()
    model.vae_tile_size = SMALL_TILE
    log.warning("the autoencoder does not fit in memory; images are decoded in tiles of %d pixels now", SMALL_TILE)
    return run_vae(model, lambda row: model.decode(latents[row]).float(), rows)


def run_vae(model: Family, make: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """make(rows) in the autoencoder's own dtype; again in float32 for the rows where half precision overflows.

    Row by row, so that a row's result does not depend on the other rows or on earlier batches.
    """
    vae = model.parts["vae"]
    with vae.hold(), without_autocast(vae):
        result = make(rows)
        good = torch.isfinite(result).flatten(1).all(1)
        if vae.dtype in HALF_DTYPES and not good.all():
            if not model.overflow_warned:
                model.overflow_warned = True
                log.warning(
                    "the autoencoder overflows in %s; images where it does are processed again in float32 "
                    "(--no_half_vae: all images)",
                    str(vae.dtype).removeprefix("torch."),
                )
            with in_float32(vae):
                result[~good] = make(rows[~good.to(rows.device)])
    return result


def without_autocast(part: Part) -> AbstractContextManager[Any]:
    """A context in which a network computes in its own dtype, also inside of autocast."""
    return torch.autocast(part.device.type, enabled=False)


@contextmanager
def in_float32(part: Part) -> Iterator[None]:
    """A context in which the weights are in float32; back in half precision they have the same bits as before."""
    dtype = part.dtype
    part.convert(torch.float32)
    try:
        yield
    finally:
        part.convert(dtype)


def draw_posterior_noise(latents: LatentSpec, shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """(B, C, h, w) standard normal noise for pixels of `shape` (B, 3, H, W), drawn on the CPU."""
    size = (latents.channels, shape[-2] // latents.downscale, shape[-1] // latents.downscale)
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def encode_text(
    model: Family, part: str, captions: Sequence[str], *, weighted: bool, negative: bool = False
) -> list[Tensors]:
    """One encoder's features, one dict per caption; `weighted`: (words) and [words] are prompt weights.

    The family's prompt prefix comes before each caption, without prompt weights; not before a `negative` prompt or an
    empty one, so that a dropped caption equals the empty prompt of classifier-free guidance.
    """
    if negative and model.model_options.add_system_prompt_to_negative_prompt:
        prefixes = [model.prompt_prefix] * len(captions)
    else:
        prefixes = ["" if negative or not caption else model.prompt_prefix for caption in captions]
    if not (weighted and "weighted_captions" in model.options):
        return model.encode_text(part, [prefix + text for prefix, text in zip(prefixes, captions, strict=True)])
    texts = [((prefix, 1.0), *parse_weights(text)) for prefix, text in zip(prefixes, captions, strict=True)]
    encoded = model.encode_text(part, [strip_weights(text) for text in texts])
    return [
        model.apply_prompt_weights(part, features, text) if has_weights(text) else features
        for features, text in zip(encoded, texts, strict=True)
    ]


def describe_cut_captions(model: Family, captions: Sequence[str], *, weighted: bool) -> str:
    """A line about captions that every text encoder cuts; empty where there are none."""
    texts = [strip_weights(parse_weights(caption)) for caption in captions] if weighted else list(captions)
    budgets = [budget for part in model.text_parts if (budget := model.token_budget(part, texts)) is not None]
    largest = max(budgets, key=lambda budget: budget.limit, default=None)
    if largest is None or not texts:
        return ""
    over = sum(length > largest.limit for length in largest.lengths)
    longest = max(range(len(texts)), key=largest.lengths.__getitem__)
    cut = f"{over} of {plural(len(texts), 'caption has', 'captions have')} more than {largest.limit} tokens and are cut"
    return f"{cut}; the longest has {largest.lengths[longest]}: {captions[longest][:60]!r}" if over else ""


@torch.no_grad()
def encode_captions(
    model: Family, part: str, captions: Sequence[str], *, weighted: bool = False, negative: bool = False
) -> list[Tensors]:
    """The features of an encoder that does not train, one dict per caption; it is loaded for it where it is not."""
    with model.parts[part].hold(), without_autocast(model.parts[part]):
        return encode_text(model, part, captions, weighted=weighted, negative=negative)


@dataclass
class FrozenTextEncoders:
    """Features of encoders that do not train: encoded one caption at a time, as for the cache, and kept on the CPU."""

    model: Family
    weighted: bool = False  # whether captions have prompt weights
    limit: int = 1 << 30  # bytes kept; without it shuffled captions would fill the memory
    _features: dict[tuple[str, str, bool, bool], Tensors] = field(default_factory=dict)
    _bytes: int = 0  # bytes

    def encode(
        self, part: str, captions: Sequence[str], *, weighted: bool | None = None, negative: bool = False
    ) -> Tensors:
        """Stacked and padded features of one encoder; weighted: None: as for captions."""
        weighted = self.weighted if weighted is None else weighted
        return _stack_features([self._encode_one(part, caption, weighted, negative) for caption in captions])

    def can_encode(self, part: str, caption: str, *, weighted: bool, negative: bool = False) -> bool:
        """False where the encoder's file is not here and its cached features have no such caption."""
        known = (part, caption, weighted, negative) in self._features
        return known or part not in self.model.blueprint.cached_parts

    def _encode_one(self, part: str, caption: str, weighted: bool, negative: bool) -> Tensors:
        key = (part, caption, weighted, negative)
        if key not in self._features:
            (features,) = encode_captions(self.model, part, [caption], weighted=weighted, negative=negative)
            self.remember(part, caption, features, weighted=weighted, negative=negative)
        return self._features[key]

    def remember(self, part: str, caption: str, features: Tensors, *, weighted: bool, negative: bool) -> None:
        """Keep a caption's features, and give up the oldest where they are too many."""
        key = (part, caption, weighted, negative)
        features = {name: tensor.cpu() for name, tensor in features.items()}
        self._bytes += count_bytes(features) - count_bytes(self._features.pop(key, {}))
        while self._bytes > self.limit and self._features:
            self._bytes -= count_bytes(self._features.pop(next(iter(self._features))))
        self._features[key] = features


def encode_with_grad(
    model: Family, part: str, captions: Sequence[str], *, weighted: bool = False, negative: bool = False
) -> Tensors:
    """Stacked and padded features of an encoder that trains, with gradients."""
    return _stack_features(encode_text(model, part, captions, weighted=weighted, negative=negative))


def count_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _stack_features(rows: Sequence[Tensors]) -> Tensors:
    """The features of several captions with a batch dimension, padded to the longest."""
    stacked: Tensors = {}
    for name in rows[0]:
        stacked[name] = pad_stack([features[name] for features in rows])
    return stacked
