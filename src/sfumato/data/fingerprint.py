"""What a run's data is, in a few numbers and checksums: kept in a state, and compared when the run is resumed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sfumato.common.text import plural
from sfumato.data.find.image_table import ImageTable, TextColumn
from sfumato.data.plans import DataPlan, DatasetPlan, SubsetPlan

DIGEST_BYTES = 12


def fingerprint_data(plan: DataPlan) -> dict[str, Any]:
    """Plain JSON: by dataset and folder, the latter by its name alone, the images and how they are used."""
    datasets: dict[str, Any] = {}
    for number, dataset in enumerate(plan.datasets, 1):
        datasets[f"dataset {number}"] = fingerprint_dataset(dataset)
    return {"processes": plan.processes, "datasets": datasets}


def fingerprint_dataset(dataset: DatasetPlan) -> dict[str, Any]:
    width, height = dataset.settings.resolution
    subsets: dict[str, Any] = {}
    seen: Counter[str] = Counter()
    for subset in dataset.subsets:
        name = subset.settings.source.name
        seen[name] += 1
        subsets[name if seen[name] == 1 else f"{name} ({seen[name]})"] = fingerprint_subset(subset)
    return {"resolution": f"{width}x{height}", "batch size": dataset.settings.batch_size, "subsets": subsets}


def fingerprint_subset(subset: SubsetPlan) -> dict[str, Any]:
    """The files by their names and sizes, since copying changes their times."""
    images: ImageTable = subset.items.images
    references = [part for each in images.references for part in (digest_texts(each.names), digest_sizes(each))]
    return {
        "images": len(images),
        "repeats": subset.settings.num_repeats,
        "file names": digest_texts(images.names),
        "file sizes": digest_sizes(images),
        "captions": digest_texts(images.captions),
        **({"reference images": digest_bytes(*map(str.encode, references))} if references else {}),
    }


def digest_sizes(images: ImageTable) -> str:
    return digest_bytes(np.ascontiguousarray(images.byte_counts).tobytes())


def digest_texts(column: TextColumn) -> str:
    return digest_bytes(bytes(column.block), np.ascontiguousarray(column.ends).tobytes())


def digest_bytes(*contents: bytes) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def compare_fingerprints(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for everything that was different in the data of the saved run."""
    if before["processes"] != now["processes"]:
        yield f"the run had {plural(before['processes'], 'process', 'processes')}, now it has {now['processes']}"
    old, new = before["datasets"], now["datasets"]
    for name in dict.fromkeys((*old, *new)):
        if name not in old or name not in new:
            yield f"{name} is {'gone' if name in old else 'new'}, with all its images"
            continue
        for fact in ("resolution", "batch size"):
            if old[name][fact] != new[name][fact]:
                yield f"the {fact} of {name} was {old[name][fact]}, now it is {new[name][fact]}"
        yield from compare_subsets(old[name]["subsets"], new[name]["subsets"])


def compare_subsets(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*old, *new)):
        if name not in new:
            yield f"the {plural(old[name]['images'], 'image')} of {name} are gone from the dataset"
        elif name not in old:
            yield f"the {plural(new[name]['images'], 'image')} of {name} are new in the dataset"
        else:
            yield from compare_images(name, old[name], new[name])


def compare_images(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for fact in ("images", "repeats"):
        if old[fact] != new[fact]:
            yield f"{name} of the dataset had {old[fact]} {fact}, now it has {new[fact]}"
    facts = ("file names", "file sizes", "captions", "reference images")
    changed: Sequence[str] = [fact for fact in facts if old.get(fact) != new.get(fact)]
    if changed and old["images"] == new["images"]:
        yield f"the images of {name} in the dataset have other {' and '.join(changed)}"
