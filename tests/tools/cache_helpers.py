"""Help for the tests of `sfumato dataset cache`: fill a cache as the command does, and change an image or a caption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.cli.dataset_cache import DatasetCacheOptions, make_cache_config
from sfumato.config.command import read_command
from sfumato.data.caches import Caches
from sfumato.tools import dataset_cache
from toy_runs import make_arguments

CACHED, CREATED = (5, 0), (0, 5)  # all five entries found in the cache, or all five made


def fill(
    toy: Mapping[str, Path], images: Path, cache: Path, *, machine: tuple[int, int] = (0, 1), **options: Any
) -> Caches:
    """What `sfumato dataset cache` does with these options, to the end of its process."""
    argv = make_arguments(toy, images, cache / "out", cache_dir=cache, **options)
    config = make_cache_config(read_command(argv, DatasetCacheOptions))
    caches = dataset_cache.fill_dataset_caches(config, machine=machine)
    caches.close()
    return caches


def counts(caches: Caches) -> dict[str, tuple[int, int]]:
    """Kind -> entries found in the cache, entries made."""
    return {kind: tuple(count) for kind, count in caches.counts.items()}


def change_pixel(images: Path) -> None:
    path = images / "2_cat" / "1.png"
    pixels = np.array(Image.open(path))
    pixels[3, 4, 0] ^= 1
    Image.fromarray(pixels).save(path)


def change_letter(images: Path) -> None:
    path = images / "2_cat" / "2.txt"
    path.write_text(path.read_text().replace("cat", "car"))
