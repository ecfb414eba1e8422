"""What the networks that do not train make of pictures and captions, live or for the cache: bit for bit the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.batch import Tensors, pad_stack
from sfumato.data.prompt_weighting import emphasised, parse, plain
from sfumato.diffusion.objective import LatentSpec
from sfumato.errors import UserError
from sfumato.families.base import Family

log = logging.getLogger(__name__)
HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def encode_images(model: Family, pixels: Tensor, seeds: Sequence[int], *, vae_batch_size: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32; each posterior is drawn with its entry's own seed.

    Latents that are not finite even in float32 stay so: who knows the picture's name tells of them.
    """
    noise = posterior_noise(model.latents, pixels.shape, seeds)

    def encoded(rows: Tensor) -> Tensor:
        found = model.encode_image(pixels[rows], noise[rows])
        return found.to(torch.promote_types(found.dtype, torch.float32))

    chunks = torch.arange(len(pixels)).split(vae_batch_size)
    return torch.cat([finite(model, encoded, rows) for rows in chunks])


@torch.no_grad()
def decode_latents(model: Family, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> (B, 3, H, W) in about [-1, 1], float32; UserError where that is not finite.

    One at a time, which takes the least memory, on the device of the latents though the autoencoder was put away.
    """
    with at_hand(model.vae, latents.device):
        rows = torch.arange(len(latents)).split(1)
        found = torch.cat([finite(model, lambda row: model.decode(latents[row]).float(), row) for row in rows])
    if not torch.isfinite(latents).all():
        raise UserError("the denoiser makes latents that are not finite")
    if not torch.isfinite(found).all():
        raise UserError("the autoencoder makes a picture that is not finite, in float32 neither")
    return found


def finite(model: Family, make: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """make(rows) by the autoencoder as it is; again in float32 for those rows where half precision overflowed.

    Each row decides for itself, so that what becomes of it depends on no other, and on nothing that was before.
    """
    with as_loaded(model.vae):
        found = make(rows)
        good = torch.isfinite(found).flatten(1).all(1)
        dtype = next(model.vae.parameters()).dtype
        if dtype in HALF and not good.all():
            if not model.overflow_told:
                model.overflow_told = True
                log.warning(
                    "the autoencoder overflows in %s: such pictures are done again in float32, as all are with "
                    "--no_half_vae",
                    str(dtype).removeprefix("torch."),
                )
            with in_float32(model.vae):
                found[~good] = make(rows[~good.to(rows.device)])
    return found


def as_loaded(module: nn.Module) -> AbstractContextManager[Any]:
    """Within, a network on whatever device computes in its own dtype, whoever asks."""
    return torch.autocast(next(module.parameters()).device.type, enabled=False)


@contextmanager
def at_hand(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on a device for a while, wherever it is kept."""
    home = next(module.parameters()).device
    nn.Module.to(module, device)
    try:
        yield
    finally:
        nn.Module.to(module, home)


@contextmanager
def in_float32(vae: nn.Module) -> Iterator[None]:
    """The same weights in float32 for a while; back in half precision they are what they were, bit for bit."""
    dtype = next(vae.parameters()).dtype
    nn.Module.to(vae, torch.float32)  # a module of diffusers would warn of what it might lose
    try:
        yield
    finally:
        nn.Module.to(vae, dtype)


def posterior_noise(latents: LatentSpec, shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """(B, C, h, w) standard normal for pixels of `shape` (B, 3, H, W), drawn on the CPU."""
    size = (latents.channels, shape[-2] // latents.downscale, shape[-1] // latents.downscale)
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def encode_text(
    model: Family, part: str, captions: Sequence[str], *, weighted: bool, negative: bool = False
) -> list[Tensors]:
    """One encoder's features, one dict per caption; `weighted`: (words) and [words] count more and less.

    The family's preamble stands before each, its marks read as they are; not before a `negative` prompt or no words
    at all, so that a dropped caption is what classifier-free guidance leads away from.
    """
    before = ["" if negative or not caption else model.preamble for caption in captions]
    if not (weighted and "weighted_captions" in model.options):
        return model.encode_text(part, [start + text for start, text in zip(before, captions, strict=True)])
    pieces = [((start, 1.0), *parse(text)) for start, text in zip(before, captions, strict=True)]
    found = model.encode_text(part, [plain(each) for each in pieces])
    return [
        model.weigh(part, features, each) if emphasised(each) else features
        for features, each in zip(found, pieces, strict=True)
    ]


def cut_captions(model: Family, captions: Sequence[str], *, weighted: bool) -> str:
    """A line about captions of which every text encoder leaves out the end; empty where there are none."""
    words = [plain(parse(each)) for each in captions] if weighted else list(captions)
    rooms = [room for part in model.text_parts if (room := model.room(part, words)) is not None]
    roomiest = max(rooms, key=lambda room: room.limit, default=None)
    if roomiest is None or not words:
        return ""
    over = sum(length > roomiest.limit for length in roomiest.lengths)
    longest = max(range(len(words)), key=roomiest.lengths.__getitem__)
    cut = f"{over} of {len(words)} captions are longer than the {roomiest.limit} tokens that are read, and are cut"
    return f"{cut}; the longest has {roomiest.lengths[longest]}: {captions[longest][:60]!r}" if over else ""


@torch.no_grad()
def encode_captions(
    model: Family, part: str, captions: Sequence[str], *, weighted: bool = False, negative: bool = False
) -> list[Tensors]:
    """The features of an encoder that does not train, one dict per caption."""
    with as_loaded(model.parts[part].module):
        return encode_text(model, part, captions, weighted=weighted, negative=negative)


@dataclass
class FrozenText:
    """Features of encoders that do not train: one caption at a time, as the cache makes them, and kept."""

    model: Family
    weighted: bool = False  # whether captions are read with emphasis
    limit: int = 10_000  # captions kept; shuffled ones would fill the memory otherwise
    _kept: dict[tuple[str, str, bool, bool], Tensors] = field(default_factory=dict)

    def encode(
        self, part: str, captions: Sequence[str], *, weighted: bool | None = None, negative: bool = False
    ) -> Tensors:
        """Stacked and padded features of one encoder; `weighted` where it is not as for captions."""
        weighted = self.weighted if weighted is None else weighted
        found = [self._one(part, caption, weighted, negative) for caption in captions]
        return {name: pad_stack([features[name] for features in found]) for name in found[0]}

    def _one(self, part: str, caption: str, weighted: bool, negative: bool) -> Tensors:
        key = (part, caption, weighted, negative)
        if key not in self._kept:
            if len(self._kept) >= self.limit:
                self._kept.pop(next(iter(self._kept)))
            found = encode_captions(self.model, part, [caption], weighted=weighted, negative=negative)
            self._kept[key] = found[0]
        return self._kept[key]


def live_text(
    model: Family, part: str, captions: Sequence[str], *, weighted: bool = False, negative: bool = False
) -> Tensors:
    """Features of an encoder that trains, with gradients."""
    found = encode_text(model, part, captions, weighted=weighted, negative=negative)
    return {name: pad_stack([features[name] for features in found]) for name in found[0]}


def fingerprint(module: nn.Module, *facts: str) -> str:
    """A hash of every weight of a network and of what else its output depends on; part of each cache key."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
