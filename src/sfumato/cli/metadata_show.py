"""`sfumato metadata show`: the metadata of a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import read_options
from sfumato.config.values import FilePath


class MetadataShowOptions(Options):
    """Shows the metadata of a safetensors file as JSON, sorted by key."""

    file: FilePath = option(None, "the file", positional=True, required=True)


def main(argv: Sequence[str]) -> int:
    """Run `sfumato metadata show`."""
    if asks_for_help(argv):
        print(command_help("sfumato metadata show", MetadataShowOptions), end="")
        return 0
    options = read_options(argv, MetadataShowOptions)
    from sfumato.tools.file_metadata import format_metadata

    print(format_metadata(options.file))
    return 0
