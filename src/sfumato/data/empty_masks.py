"""Masks that leave nothing of their image; each file is read once, and the result stored beside the dataset index."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfumato.common.text import list_some
from sfumato.data.find.index import Index
from sfumato.data.find.verify_images import hash_row
from sfumato.data.masks import MaskItem, find_mask
from sfumato.data.plans import DataPlan
from sfumato.errors import UserError

log = logging.getLogger(__name__)
LOGGED_FROM = 1000  # masks to read, from which on a line is logged first


def report_empty_masks(plan: DataPlan, cache_dir: Path, *, workers: int) -> None:
    """Warn of images that train nothing, since their mask or alpha channel excludes all of them."""
    masks = list_masks(plan)
    if not masks:
        return
    empty = find_empty_masks(masks, cache_dir, workers=workers)
    names = list(dict.fromkeys(mask.image.path for mask, none_left in zip(masks, empty, strict=True) if none_left))
    if names:
        log.warning("masks leave nothing of these images, which train nothing: %s", list_some(names))


def list_masks(plan: DataPlan) -> list[MaskItem]:
    """The mask of each image, with all that its crop may show."""
    masks: dict[MaskItem, None] = {}
    for _, subset, item in plan.iterate_used():
        rules = subset.settings.images
        transform = item.center_transform(rules)
        if rules.random_crop:
            transform = replace(transform, bucket=transform.resized, offset=(0, 0))
        mask = find_mask(item, rules, transform)
        if mask is not None:
            masks[mask] = None
    return list(masks)


def find_empty_masks(masks: Sequence[MaskItem], cache_dir: Path, *, workers: int) -> list[bool]:
    """Whether each mask is 0 everywhere."""
    index = Index(cache_dir, ("empty masks",))
    stored = index.load()
    known = {} if stored is None else dict(zip(stored["names"].tolist(), stored["empty"].tolist(), strict=True))
    hashes = hash_masks(masks).tolist()
    unknown = [number for number, key in enumerate(hashes) if key not in known]
    if len(unknown) > LOGGED_FROM:
        log.info("reading %d masks once, to find those that leave nothing of their image", len(unknown))
    if unknown:
        with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-masks") as pool:
            results = pool.map(is_empty, [masks[number] for number in unknown])
            known |= {hashes[number]: empty for number, empty in zip(unknown, results, strict=True)}
        names = np.array(list(known), np.uint64)
        index.save({"names": names, "empty": np.array(list(known.values()), np.bool_)})
    return [bool(known[key]) for key in hashes]


def hash_masks(masks: Sequence[MaskItem]) -> NDArray[np.uint64]:
    """64 bits for each file as it is now, with the channel and the transform."""
    rows: list[int] = []
    for mask in masks:
        identity = f"{hash_row(mask.image)}\0{mask.channel}\0{mask.transform}"
        digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
        rows.append(int.from_bytes(digest, "little"))
    return np.array(rows, np.uint64)


def is_empty(mask: MaskItem) -> bool:
    """False for a file that cannot be read, which is reported elsewhere."""
    try:
        return not mask.read().any()
    except UserError:
        return False
