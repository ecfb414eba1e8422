"""`sfumato metadata strip`: a safetensors file without the metadata that says how it was made."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import read_options
from sfumato.config.values import FilePath


class MetadataStripOptions(Options):
    """Writes a safetensors file with only the metadata that programs need to use it. Tensors keep their bytes.
    Without --save_to the file itself is replaced, once the new one is complete.
    """

    file: FilePath = option(None, "the file", positional=True, required=True)
    save_to: FilePath | None = option(None, "the file to write; the file itself by default")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato metadata strip`."""
    if asks_for_help(argv):
        print(command_help("sfumato metadata strip", MetadataStripOptions), end="")
        return 0
    options = read_options(argv, MetadataStripOptions)
    from sfumato.tools.file_metadata import strip_metadata

    print("\n".join(strip_metadata(options.file, options.save_to or options.file)))
    return 0
