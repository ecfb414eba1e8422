"""`sfumato metadata show`: the metadata of a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class MetadataShowOptions(Options):
    """Shows the metadata of a safetensors file as JSON, sorted by key."""

    file: FilePath = option(None, "the file", positional=True, required=True)


def main(argv: Sequence[str]) -> int:
    """Run `sfumato metadata show`."""
    return run_with_options("sfumato metadata show", argv, MetadataShowOptions, run)


def run(options: MetadataShowOptions) -> int:
    from sfumato.tools.file_metadata import format_metadata

    print(format_metadata(options.file))
    return 0
