"""`sfumato dataset canny`: the edges of images, as control images."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class CannyOptions(Options):
    """Writes the edges of an image, or of every image of a folder, white on black, as control images of ControlNet."""

    input: FilePath = option(None, "an image, or a folder of images", required=True, path="any")
    output: FilePath = option(None, "the file to write, or the folder, in which images keep their names", required=True)
    thres1: int = option(32, "strength from which on edges are kept that touch a strong one", ge=0)
    thres2: int = option(224, "strength from which on edges are kept", ge=0)


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset canny`."""
    return run_with_options("sfumato dataset canny", argv, CannyOptions, run_canny)


def run_canny(options: CannyOptions) -> int:
    """Find the edges; gives the exit code."""
    from sfumato.tools.canny_edges import write_edges

    faults = write_edges(options.input, options.output, options.thres1, options.thres2)
    sys.stdout.write(f"the edges are in {options.output}{f', {faults:,} could not be read' if faults else ''}\n")
    return 0
