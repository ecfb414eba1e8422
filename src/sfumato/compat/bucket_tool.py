"""sd-scripts' prepare_buckets_latents, run as `sfumato dataset cache` on the images of a metadata file."""

from __future__ import annotations

import sys
from typing import Literal

from sfumato.cli.dataset_cache import DatasetCacheOptions, make_cache_config, run_cache_command
from sfumato.common.text import plural
from sfumato.compat.file_tool import FileTool
from sfumato.config.base import Options, option
from sfumato.config.command import NO_DRY_RUN, read_command
from sfumato.config.environment import read_launch
from sfumato.config.values import FilePath

FILLED = ("cache_latents",)


class BucketPreparationOptions(Options):
    """Puts the latents of the images of a metadata file into the cache, and writes the file again with the size of each
    image's bucket. Train with the new file as --in_json, and with the same resolution, buckets and precision.
    """

    train_data_dir: FilePath = option(None, "the folder of images", positional=True, required=True)
    in_json: FilePath = option(None, "the metadata file", positional=True, required=True)
    out_json: FilePath = option(None, "the metadata file to write", positional=True, required=True)
    model_name_or_path: str = option(None, "the model whose autoencoder encodes them", positional=True, required=True)
    batch_size: int = option(1, "images that are encoded at once", ge=1)
    max_data_loader_n_workers: int | None = option(None, "threads that decode images", ge=0)
    max_resolution: str = option("512,512", "resolution of the training")
    min_bucket_reso: int = option(256, "shortest side of a bucket", ge=1)
    max_bucket_reso: int = option(1024, "longest side of a bucket", ge=1)
    bucket_reso_steps: int = option(64, "steps of the sides of buckets", ge=1)
    bucket_no_upscale: bool = option(False, "never enlarge an image; buckets have the sizes of images")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "precision of the training")
    flip_aug: bool = option(False, "cache the mirror images, too")
    alpha_mask: bool = option(False, "cache the alpha channels as masks")
    full_path: bool = option(False, "accepted without effect: images are found by names and by paths")
    recursive: bool = option(False, "accepted without effect: images are found in subfolders, too")
    skip_existing: bool = option(False, "accepted without effect: what is cached is never encoded again")
    v2: bool = option(False, "accepted without effect: the model says what it is")
    debug: bool = option(False, "show where an error came from")


def make_cache_words(options: BucketPreparationOptions) -> list[str]:
    """The same as a command line of `sfumato dataset cache`."""
    values = {
        "pretrained_model_name_or_path": options.model_name_or_path,
        "train_data_dir": options.train_data_dir,
        "in_json": options.in_json,
        "resolution": options.max_resolution,
        "vae_batch_size": options.batch_size,
        "mixed_precision": options.mixed_precision,
        "max_data_loader_n_workers": options.max_data_loader_n_workers,
        **{name: vars(options)[name] for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")},
    }
    words = [f"--{name}={value}" for name, value in values.items() if value is not None]
    switches = ("bucket_no_upscale", "flip_aug", "alpha_mask", "debug")
    return [*words, "--enable_bucket", *(f"--{name}" for name in switches if vars(options)[name])]


def prepare_buckets(options: BucketPreparationOptions) -> int:
    """Fill the cache and write the metadata file; gives the exit code."""
    line = read_command(make_cache_words(options), DatasetCacheOptions, absent=NO_DRY_RUN)
    code = run_cache_command(line, kinds=FILLED)
    if code or read_launch().rank > 0:
        return code
    from sfumato.tools.bucket_metadata import write_train_resolutions

    config = make_cache_config(line, FILLED)
    count, missing = write_train_resolutions(config, options.in_json, options.out_json)
    rest = f", {missing:,} of its images have none" if missing else ""
    sys.stdout.write(
        f"{options.out_json} has the buckets of {plural(count, 'image')}{rest}; their latents are in the cache\n"
    )
    return 0


BUCKET_TOOLS = (
    FileTool(name="finetune/prepare_buckets_latents", options=BucketPreparationOptions, run=prepare_buckets),
)
