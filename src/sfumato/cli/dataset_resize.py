"""`sfumato dataset resize`: smaller copies of images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class ImageResizeOptions(Options):
    """Writes a copy of each image for each resolution, smaller where the image has more pixels. Images stay as they
    are.
    """

    src_img_folder: FilePath = option(None, "the folder of images", positional=True, required=True)
    dst_img_folder: FilePath = option(None, "the folder of the copies", positional=True, required=True)
    max_resolution: str = option("512x512,384x384,256x256,128x128", "resolutions of the copies")
    divisible_by: int = option(1, "crop both sides to multiples of it", ge=1)
    interpolation: Literal["area", "cubic", "lanczos4", "nearest", "linear", "box"] | None = option(
        None, "filter; area where an image shrinks by default"
    )
    save_as_png: bool = option(False, "write PNG files; JPEG of the best quality by default")
    copy_associated_files: bool = option(
        False, "copy captions and other files of an image's name for each of its copies"
    )


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset resize`."""
    return run_with_options("sfumato dataset resize", argv, ImageResizeOptions, run_resizing)


def run_resizing(options: ImageResizeOptions) -> int:
    """Resize; gives the exit code."""
    from sfumato.tools.resize_images import ImageResize, parse_resolutions

    resize = ImageResize(
        resolutions=parse_resolutions(options.max_resolution),
        divisible_by=options.divisible_by,
        interpolation="lanczos" if options.interpolation == "lanczos4" else options.interpolation,
        as_png=options.save_as_png,
        copy_others=options.copy_associated_files,
    )
    faults = resize.run(options.src_img_folder, options.dst_img_folder)
    sys.stdout.write(
        f"the copies are in {options.dst_img_folder}{f', {faults:,} could not be read' if faults else ''}\n"
    )
    return 0
