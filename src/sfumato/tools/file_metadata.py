"""The metadata of a safetensors file: shown, changed, or reduced to what programs need; tensors keep their bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.families.checkpoint_saving import SOURCE_METADATA, iterate_stored
from sfumato.formats.checkpoint import TensorFile
from sfumato.formats.hashes import HASH_KEYS, add_hashes
from sfumato.formats.header import read_header
from sfumato.formats.metadata import keep_minimum
from sfumato.tools.adapter_files.outputs import check_output, name_output, write_checkpoint

SAFETENSORS = ".safetensors"


def format_metadata(path: Path) -> str:
    """The metadata as JSON, sorted; UserError for a file without any."""
    metadata = read_header(path).metadata
    if not metadata:
        raise UserError(f"{path} has no metadata", code="metadata-missing")
    return json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False)


def set_metadata(path: Path, output: Path, texts: Sequence[str]) -> list[str]:
    """Write the file with other metadata. texts: KEY=VALUE; an empty value removes the key. The lines of the report."""
    metadata = dict(read_header(path).metadata)
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(
                f"{text!r} is not KEY=VALUE", code="metadata-entry-invalid", fix='e.g. "modelspec.title=A cat"'
            )
        metadata |= {key: value} if value else {}
        if not value:
            metadata.pop(key, None)
    return write_metadata(path, output, metadata)


def strip_metadata(path: Path, output: Path) -> list[str]:
    """Write the file with the metadata that programs need to use it, and none of how it was made."""
    before = read_header(path).metadata
    needed = {name: before[name] for name in SOURCE_METADATA if name in before}
    return write_metadata(path, output, {**needed, **keep_minimum(before)})


def write_metadata(path: Path, output: Path, metadata: Mapping[str, str]) -> list[str]:
    """Write a file's tensors with this metadata; an adapter's hashes, which cover a part of it, are made anew."""
    check_output(output, [], suffixes=(SAFETENSORS,))
    named = name_output(output)
    with TensorFile(path) as file:
        had_hashes = HASH_KEYS[0] in file.header.metadata
        own = {name: value for name, value in metadata.items() if name not in HASH_KEYS}
        if had_hashes:
            tensors = {name: file.read(name) for name in file.header.tensors}
            own = add_hashes(own, tensors)
        warnings = write_checkpoint(output, iterate_stored(file), own, None)
    return [*warnings, f"{named}: {plural(len(metadata), 'entry', 'entries')}"]
