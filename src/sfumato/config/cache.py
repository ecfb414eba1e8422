"""Options of what is computed once and kept, and of the processes that load data."""

from __future__ import annotations

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class CacheOptions(Options):
    """Caches"""

    cache_latents: bool = option(False, "encode every image once and keep the result in memory")
    cache_latents_to_disk: bool = option(False, "the same on disk, for later runs, too; includes --cache_latents")
    cache_text_encoder_outputs: bool = option(False, "encode every caption once; for text encoders that do not train")
    cache_text_encoder_outputs_to_disk: bool = option(False, "the same on disk; includes --cache_text_encoder_outputs")
    cache_dir: FilePath | None = option(
        None, "folder of the caches, shared by all runs; without it a folder in the user's cache directory"
    )
    vae_batch_size: int = option(1, "images that the VAE encodes at a time", ge=1)
    text_encoder_batch_size: int | None = option(
        None,
        "captions encoded at a time for the cache; without it each on its own, as exact as without a cache",
        ge=1,
    )
    text_cache_variants: int = option(
        1,
        "captions kept of each where shuffle_caption, tag dropout or wildcards change them; 1 refuses these",
        ge=1,
    )
    skip_cache_check: bool = option(
        False, "trust that cached entries are whole; without it each is read once before training"
    )


class LoaderOptions(Options):
    """Data loading"""

    max_data_loader_n_workers: int = option(8, "threads that prepare data, at most one per core; 0 for none", ge=0)
    persistent_data_loader_workers: bool = option(
        False, "keep these threads between epochs", no_effect="they are always kept"
    )
