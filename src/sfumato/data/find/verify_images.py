"""Which pictures can be decoded to their last byte: found out once for each file and remembered."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sfumato.data.find.image_table import Column, Picture, Pictures
from sfumato.data.find.index import Index
from sfumato.data.find.policy import Policy, told_of_bad, told_of_memory
from sfumato.data.find.report import Report
from sfumato.data.images import decode
from sfumato.errors import UserError

log = logging.getLogger(__name__)
MANY = 1000  # pictures that are worth a line beforehand

Progress = Callable[[int, int], None]


def undamaged(pictures: Pictures, where: str, policy: Policy, report: Report) -> Column:
    """Places of the pictures to keep: all of them, unless bad ones are to be left out wherever their damage lies.

    Headers do not tell of damage in the midst of a picture. The default policy leaves it to the step that needs the
    picture; whoever wants bad pictures left out does not want to be stopped there.
    """
    places = np.arange(len(pictures))
    if not policy.decoding or not len(pictures):
        return places
    about = (where,) if "" in pictures.origins else pictures.origins
    index = Index(policy.cache_dir, ("decoded", *about))
    names = np.fromiter(map(digest, pictures), np.uint64, len(pictures))
    known = index.load()
    unknown = places if known is None else np.flatnonzero(~np.isin(names, known["names"]))
    if not len(unknown):
        return places
    if len(unknown) > MANY:
        log.info("%s: decoding %d pictures once, since bad ones are to be left out", where, len(unknown))
    asked = [pictures.row(place) for place in unknown.tolist()]
    faults = faults_of(asked, workers=os.cpu_count() or 1)
    damaged = unknown[[fault is not None for fault in faults]]
    good = np.setdiff1d(places, damaged)
    told_of_memory(index.save({"names": names[good]}), policy, report)
    bad = [
        (pictures.names.row(place), fault)
        for place, fault in zip(unknown.tolist(), faults, strict=True)
        if fault is not None
    ]
    told_of_bad(bad, where, policy, report)
    return good


def digest(picture: Picture) -> int:
    """Stands for the very file, or the very place in an archive."""
    facts = f"{picture.path}\0{picture.bytes}\0{picture.mtime_ns}\0{picture.offset}"
    return int.from_bytes(hashlib.blake2b(facts.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def faults_of(pictures: Sequence[Picture], *, workers: int, progress: Progress | None = None) -> list[UserError | None]:
    """What is wrong with the pixels of each picture, None where nothing is."""

    def look(picture: Picture) -> UserError | None:
        try:
            decode(picture.read(), picture.path)
        except UserError as error:
            return error
        return None

    found = []
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-decode") as pool:
        for done, fault in enumerate(pool.map(look, pictures), 1):
            found.append(fault)
            if progress is not None:
                progress(done, len(pictures))
    return found
