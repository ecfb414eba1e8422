"""The buckets of images, written into their metadata file as `train_resolution`, as other programs read it there."""

from __future__ import annotations

import os
from pathlib import Path

from sfumato.common.files import check_file_writable
from sfumato.config import Config
from sfumato.data.find.named_files import locate_images
from sfumato.tools.cache_plan import make_cache_plan
from sfumato.tools.caption_output import MetadataFile, read_metadata_entries

SIDE_STEP = 8  # of which both sides are in the file


def write_train_resolutions(config: Config, source: Path, target: Path) -> tuple[int, int]:
    """Copy a metadata file with the bucket of each image; gives how many have one, and how many do not.

    config: as the latents were cached with; its images are those of the file.
    """
    check_file_writable(target, option="the metadata file")
    entries = read_metadata_entries(source)
    buckets = find_buckets(config)
    base, paths = locate_images(list(entries), config.dataset.train_data_dir)
    count = 0
    for entry, path in zip(entries.values(), paths, strict=True):
        bucket = None if path is None else buckets.get(normalize_path(os.path.join(base, path)))  # noqa: PTH118
        if bucket is not None:
            entry["train_resolution"] = [side - side % SIDE_STEP for side in bucket]
            count += 1
    MetadataFile(path=target, name="caption", entries=entries).close()
    return count, len(entries) - count


def find_buckets(config: Config) -> dict[str, tuple[int, int]]:
    """Absolute path of every image -> width and height of its bucket."""
    plan = make_cache_plan(config, processes=1)
    return {normalize_path(item.image.path): item.choice.bucket for _, _, item in plan.data.iterate_used()}


def normalize_path(path: str) -> str:
    return os.path.normpath(os.path.abspath(path))  # noqa: PTH100
