"""`sfumato dataset dedupe`: near-duplicates and bad images of a folder, and texts that cannot be right."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import Extension, FilePath


class DedupeOptions(Options):
    """Names images that show the same, even if one is resized, compressed again or mirrored; images that are tiny,
    blurry, clipped, over-compressed or cannot be read; tags that are repeated, or contradict each other or the caption.
    Deletes nothing.
    """

    train_data_dir: FilePath = option(None, "the folder of images", positional=True, required=True)
    html: FilePath | None = option(None, "write a page with the images; it needs no other file")
    recursive: bool = option(False, "look into subfolders, too")
    caption_extension: Extension = option(".caption", "extension of the captions in sentences")
    tag_extension: Extension = option(".txt", "extension of the tags")
    max_distance: int = option(8, "of 64 bits, in which near-duplicates may differ; 0 finds copies alone", ge=0, le=32)
    min_side: int = option(256, "pixels of the shorter side, below which an image is tiny", ge=1)
    max_data_loader_n_workers: int | None = option(None, "threads that decode images; 4 by default", ge=0)


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset dedupe`."""
    return run_with_options("sfumato dataset dedupe", argv, DedupeOptions, run)


def run(options: DedupeOptions) -> int:
    from sfumato.common.files import check_file_writable, write_text
    from sfumato.tools.caption_output import DEFAULT_WORKERS
    from sfumato.tools.dataset_review import ReviewSettings, render_review, review_images
    from sfumato.tools.image_batches import list_image_paths
    from sfumato.tools.image_quality import QualityLimits

    settings = ReviewSettings(
        limits=QualityLimits(min_side=options.min_side),
        caption_extension=options.caption_extension,
        tag_extension=options.tag_extension,
        max_distance=options.max_distance,
        workers=options.max_data_loader_n_workers or DEFAULT_WORKERS,
    )
    images = list_image_paths(options.train_data_dir, recursive=options.recursive)
    if options.html is not None:
        check_file_writable(options.html, option="--html")
    review = review_images(images, settings)
    sys.stdout.write("".join(f"{line}\n" for line in review.list_lines()))
    if options.html is not None:
        write_text(options.html, render_review(review, options.train_data_dir, settings))
        sys.stdout.write(f"page written to {options.html}\n")
    return 0
