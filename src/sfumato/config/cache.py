"""Options of the caches and of data loading."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BeforeValidator

from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import FilePath, to_tuple


def parse_encoder_choices(value: Any) -> tuple[str, ...]:
    """Texts PART=ID, e.g. t5=1a2b3c4d5e6f, each part once."""
    choices = tuple(str(choice).strip() for choice in to_tuple(value))
    for choice in choices:
        if not re.fullmatch(r"\w+=[0-9a-f]+", choice):
            raise ValueError(f"has {choice!r}, which is not of the form PART=ID, e.g. t5=1a2b3c4d5e6f")
    parts = [choice.partition("=")[0] for choice in choices]
    if len(set(parts)) < len(parts):
        raise ValueError("names a part twice; give one ID for each")
    return choices


EncoderChoices = Annotated[tuple[str, ...], BeforeValidator(parse_encoder_choices), Metavar("PART=ID ...")]


class CacheOptions(Options):
    """Caches"""

    cache_latents: bool = option(False, "encode each image once and cache its latents in memory")
    cache_latents_to_disk: bool = option(False, "cache latents on disk, for later runs, too; includes --cache_latents")
    cache_text_encoder_outputs: bool = option(False, "encode each caption once; for text encoders that are not trained")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "cache text encoder outputs on disk; includes --cache_text_encoder_outputs"
    )
    cache_dir: FilePath | None = option(
        None, "folder of the caches, shared by all runs; default: a folder in the user's cache directory"
    )
    cached_encoder: EncoderChoices = option(
        (), "whose cached outputs to use for encoders without a file here, where the cache holds those of several"
    )
    vae_batch_size: int = option(1, "batch size of the VAE when latents are cached", ge=1)
    text_encoder_batch_size: int | None = option(
        None,
        "batch size of the text encoders when captions are cached; default: 1, bit-identical to no cache",
        ge=1,
    )
    text_cache_variants: int = option(
        1,
        "cached variants per caption for shuffle_caption, tag dropout or wildcards; 1 refuses these options",
        ge=1,
    )
    skip_cache_check: bool = option(False, "do not verify cache entries; by default each is read once before training")

    def list_cached_parts(self, text_parts: Collection[str], live_text: Collection[str]) -> list[str]:
        """The networks whose outputs are cached, so that no step needs them. live_text: encoders that train."""
        text = [part for part in text_parts if part not in live_text] if self.cache_text_encoder_outputs else []
        return [*(["vae"] if self.cache_latents else []), *text]


class LoaderOptions(Options):
    """Data loading"""

    max_data_loader_n_workers: int = option(8, "threads that load data, at most one per core; 0 for none", ge=0)
    persistent_data_loader_workers: bool = option(
        False, "keep these threads between epochs", no_effect="they are always kept"
    )

    @property
    def workers(self) -> int:
        """Threads that load data here."""
        return min(self.max_data_loader_n_workers, os.cpu_count() or 1)
