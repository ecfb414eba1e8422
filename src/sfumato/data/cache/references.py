"""Cache references: files that list the entries which a dataset needs from an encoder, written when caches are filled.

Filling again with changed images or captions replaces the file. Pruning keeps the entries of every reference whose
image folders still exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sfumato.common import files
from sfumato.common.json_toml import decode_json
from sfumato.data.cache.shards import KEY_BYTES, make_write_error

if TYPE_CHECKING:
    from sfumato.data.plans import DataPlan, SubsetPlan

REFERENCE_SUFFIX = ".use"


@dataclass(frozen=True, kw_only=True)
class CacheReference:
    """The entries of one type that one dataset needs."""

    cache: Path  # the cache's folder
    content_type: str  # "latents", "text of clip_l"
    sources: tuple[str, ...]  # absolute paths of the folders or archives of the images
    fingerprint: str  # of the encoder
    sizes: tuple[str, ...] = ()  # the training sizes

    @property
    def path(self) -> Path:
        facts = json.dumps([self.content_type, self.sources, self.fingerprint, self.sizes])
        name = hashlib.blake2b(facts.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.cache / "uses" / f"{name}{REFERENCE_SUFFIX}"


def write_reference(reference: CacheReference, keys: Sequence[bytes]) -> None:
    """Write the keys that are needed now; UserError if the cache cannot be written."""
    header = {
        "kind": reference.content_type,
        "places": reference.sources,
        "encoder": reference.fingerprint,
        "sizes": reference.sizes,
        "keys": len(keys),
    }
    try:
        files.write_bytes(reference.path, json.dumps(header).encode() + b"\n" + b"".join(keys))
    except OSError as error:
        raise make_write_error(reference.cache, error) from error


def read_references(cache: Path) -> list[StoredReference]:
    """Every stored reference, the latest first; files that are not intact are skipped."""
    references: list[StoredReference] = []
    for path in (cache / "uses").glob(f"*{REFERENCE_SUFFIX}"):
        try:
            line, _, rest = files.read_file(path).partition(b"\n")
            header = decode_json(line)
            if len(rest) == header["keys"] * KEY_BYTES:
                reference = CacheReference(
                    cache=cache,
                    content_type=header["kind"],
                    sources=tuple(header["places"]),
                    fingerprint=header["encoder"],
                    sizes=tuple(header["sizes"]),
                )
                keys = frozenset(rest[start : start + KEY_BYTES] for start in range(0, len(rest), KEY_BYTES))
                references.append(StoredReference(reference, keys, path.stat().st_mtime, path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(references, key=lambda stored: -stored.updated)


def select_current(references: Iterable[StoredReference], *, unused_days: float | None = None) -> list[StoredReference]:
    """The references whose image folders all exist and that were updated within `unused_days`."""
    oldest = time.time() - unused_days * 86400 if unused_days is not None else float("-inf")
    current: list[StoredReference] = []
    for stored in references:
        if stored.updated >= oldest and all(Path(source).exists() for source in stored.reference.sources):
            current.append(stored)
    return current


class StoredReference(NamedTuple):
    """A reference as it is stored in the cache."""

    reference: CacheReference
    keys: frozenset[bytes]
    updated: float  # Unix time of the last filling
    path: Path


def describe_cache_use(data: DataPlan, kind: str, encoder: str, cache: Path) -> CacheReference:
    """What the entries are for."""
    datasets = (*data.datasets, *data.validation)
    folders: set[str] = set()
    for dataset in datasets:
        for subset in dataset.subsets:
            folders |= list_image_folders(subset)
    sizes = {f"{dataset.settings.resolution[0]}x{dataset.settings.resolution[1]}" for dataset in datasets}
    return CacheReference(
        cache=cache,
        content_type=kind,
        sources=tuple(sorted(folders)),
        fingerprint=encoder,
        sizes=tuple(sorted(sizes)) if kind in ("latents", "masks", "reference images", "masked images") else (),
    )


def list_image_folders(subset: SubsetPlan) -> set[str]:
    """The folders and archives that hold the images."""
    pictures = subset.items.images
    if "" in pictures.origins:
        return {os.path.dirname(path) for path in pictures.paths()}  # noqa: PTH120 -- strings, for many thousands
    return {os.path.abspath(origin) for origin in pictures.origins}  # noqa: PTH100
