"""`sfumato metadata set`: other metadata in a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import FilePath, to_tuple

KeyValues = Annotated[tuple[str, ...], BeforeValidator(to_tuple), Metavar("KEY=VALUE ...")]


class MetadataSetOptions(Options):
    """Writes a safetensors file with some entries of its metadata set, or removed where the value is empty. Tensors
    keep their bytes. Without --save_to the file itself is replaced, once the new one is complete.
    """

    file: FilePath = option(None, "the file", positional=True, required=True)
    entries: KeyValues = option((), "e.g. modelspec.title=Cats", positional=True, required=True)
    save_to: FilePath | None = option(None, "the file to write; the file itself by default")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato metadata set`."""
    return run_with_options("sfumato metadata set", argv, MetadataSetOptions, run)


def run(options: MetadataSetOptions) -> int:
    from sfumato.tools.file_metadata import set_metadata

    print("\n".join(set_metadata(options.file, options.save_to or options.file, options.entries)))
    return 0
