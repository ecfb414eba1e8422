"""`sfumato metadata strip`: a safetensors file without the metadata that says how it was made."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class MetadataStripOptions(Options):
    """Writes a safetensors file with only the metadata that programs need to use it. Tensors keep their bytes.
    Without --save_to the file itself is replaced, once the new one is complete.
    """

    file: FilePath = option(None, "the file", positional=True, required=True)
    save_to: FilePath | None = option(None, "the file to write; the file itself by default")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato metadata strip`."""
    return run_with_options("sfumato metadata strip", argv, MetadataStripOptions, run)


def run(options: MetadataStripOptions) -> int:
    from sfumato.tools.file_metadata import strip_metadata

    print("\n".join(strip_metadata(options.file, options.save_to or options.file)))
    return 0
