"""The networks that fill caches: each is loaded for the first thing that it encodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.config import Config
from sfumato.data.batch import Tensors
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.encoding import encode_captions, encode_images, encode_unpainted


@dataclass(frozen=True, kw_only=True)
class CacheEncoders:
    """The autoencoder and the text encoders of a model, as caches call them."""

    config: Config
    model: Family

    def encode_references(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Without the posterior's noise, so the seeds are not used."""
        self.model.parts["vae"].load()
        return encode_images(self.model, pixels, None, vae_batch_size=self.config.cache.vae_batch_size)

    def encode_images(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """The autoencoder is loaded for the first images, and stays until all are encoded."""
        self.model.parts["vae"].load()
        return encode_images(self.model, pixels, seeds, vae_batch_size=self.config.cache.vae_batch_size)

    def encode_captions(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        """The encoder is loaded for the first captions, and stays until all are encoded."""
        self.model.parts[part].load()
        return encode_captions(self.model, part, captions, weighted=self.config.captions.weighted_captions)

    def encode_painted(self, pixels: Tensor, masks: Tensor, seeds: Sequence[int]) -> Tensor:
        self.model.parts["vae"].load()
        size = self.config.cache.vae_batch_size
        return encode_unpainted(self.model, pixels, masks, seeds, vae_batch_size=size)

    def refuse_missing(self, part: str, unit: str) -> Callable[[int, int], UserError] | None:
        """The error for entries that are missing and whose encoder is not here; None where it is."""
        network = self.model.parts[part].network
        if not network.is_absent:
            return None
        return lambda missing, total: network.make_absent_error(
            f"the outputs of {part} for {missing} of {total} {unit} are not in the cache"
        )
