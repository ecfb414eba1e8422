"""`sfumato dataset canny`: the edges of images, as control images."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import read_options
from sfumato.config.values import FilePath


class CannyOptions(Options):
    """Writes the edges of an image, or of every image of a folder, white on black, as control images of ControlNet."""

    input: FilePath = option(None, "an image, or a folder of images", required=True, path="any")
    output: FilePath = option(None, "the file to write, or the folder, in which images keep their names", required=True)
    thres1: int = option(32, "strength from which on edges are kept that touch a strong one", ge=0)
    thres2: int = option(224, "strength from which on edges are kept", ge=0)


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset canny`."""
    if asks_for_help(argv):
        sys.stdout.write(command_help("sfumato dataset canny", CannyOptions))
        return 0
    return run_canny(read_options(argv, CannyOptions))


def run_canny(options: CannyOptions) -> int:
    """Find the edges; gives the exit code."""
    from sfumato.tools.canny_edges import write_edges

    faults = write_edges(options.input, options.output, options.thres1, options.thres2)
    sys.stdout.write(f"the edges are in {options.output}{f', {faults:,} could not be read' if faults else ''}\n")
    return 0
