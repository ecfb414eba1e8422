"""Keeps a file's metadata within what a safetensors header may hold, and its texts within UTF-8."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from sfumato.formats.header import MAX_HEADER_BYTES
from sfumato.formats.metadata import MINIMUM_KEYS

METADATA_BYTES = MAX_HEADER_BYTES - 10_000_000  # the rest is for the names and shapes of tensors
MOST_BYTES_PER_LETTER = 6  # of a letter in JSON
THUMBNAIL_KEY = "modelspec.thumbnail"


def fit_metadata(metadata: Mapping[str, str], limit: int | None = None) -> tuple[dict[str, str], list[str]]:
    """The metadata within `limit` bytes, and what was shortened: thumbnail, rare tags, then the longest texts."""
    limit = METADATA_BYTES if limit is None else limit
    fitted = {name: replace_surrogates(value) for name, value in metadata.items()}
    notes: list[str] = []
    if sum(map(len, fitted.values())) * MOST_BYTES_PER_LETTER < limit:
        return fitted, notes
    if measure(fitted) > limit and fitted.pop(THUMBNAIL_KEY, None):
        notes.append("the thumbnail is not in the saved files: with it their metadata would be too long")
    notes += shorten_tags(fitted, limit)
    for name in sorted(set(fitted) - {*MINIMUM_KEYS}, key=lambda name: -len(fitted[name])):
        if measure(fitted) <= limit:
            break
        del fitted[name]
        notes.append(f"{name} is not in the saved files: with it their metadata would be too long")
    return fitted, notes


def measure(metadata: Mapping[str, str]) -> int:
    """Bytes in a header."""
    return len(json.dumps(dict(metadata), ensure_ascii=False).encode())


def replace_surrogates(text: str) -> str:
    """Bytes of a file name that are no UTF-8, which no header can hold, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def shorten_tags(metadata: dict[str, str], limit: int) -> list[str]:
    """Keep the most frequent tags of each folder, as many as fit; nothing else of the metadata changes."""
    tables = {name: json.loads(metadata[name]) for name in TAG_TABLES if name in metadata}
    kept = max((max(TAG_TABLES[name](table, -1), default=0) for name, table in tables.items()), default=0)
    shortened = False
    while measure(metadata) > limit and kept:
        kept //= 2
        for name, table in tables.items():
            TAG_TABLES[name](table, kept)
            metadata[name] = json.dumps(table)
        shortened = True
    if not shortened:
        return []
    return [f"of each folder's tags only the {kept} most frequent are in the metadata, which would be too long"]


def cut_counts(table: dict[str, dict[str, int]], kept: int) -> list[int]:
    """Folder -> tag -> count with the `kept` highest counts of each folder, all below 0; the numbers of tags before."""
    sizes = [len(counts) for counts in table.values()]
    for folder, counts in table.items() if kept >= 0 else ():
        table[folder] = dict(sorted(counts.items(), key=lambda item: -item[1])[:kept])
    return sizes


def cut_dataset_counts(datasets: list[dict[str, Any]], kept: int) -> list[int]:
    """The same for the table of each dataset."""
    sizes: list[int] = []
    for dataset in datasets:
        sizes += cut_counts(dataset.get("tag_frequency", {}), kept)
    return sizes


TAG_TABLES: dict[str, Callable[[Any, int], list[int]]] = {
    "ss_tag_frequency": cut_counts,
    "ss_datasets": cut_dataset_counts,
}
