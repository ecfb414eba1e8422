"""How processes and machines share the work of filling a cache, each entry made once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sfumato.data.cache.entries import TensorCache
from sfumato.data.cache.references import CacheReference
from sfumato.errors import UserError

FillProgress = Callable[[int, int], None]  # done, total
PEER_TIMEOUT = 60.0  # seconds without new entries from other processes, after which their share is created here


def share_work(
    cache: TensorCache, keys: Sequence[bytes], make: Callable[[Sequence[bytes]], Iterator[int]], options: FillOptions
) -> FillCounts:
    """Create the missing entries of this process's share, and wait until the other processes have created theirs.

    Nothing here has the time limit of a collective call; what the others have not created, e.g. on machines that share
    no store after all, is created here. With options.check every process reads every entry, so that all of them know
    which are damaged.
    """
    keys = [key for key in keys if belongs_to_part(key[:4], options.machine, options.machines)]
    if options.check:
        cache.store.check(keys)
    missing = cache.find_missing(keys)
    if missing and options.refuse:
        raise options.refuse(len(missing), len(keys))
    alone = options.processes == 1 or not cache.store.shared
    own_share = (
        missing if alone else [key for key in missing if belongs_to_part(key[-4:], options.rank, options.processes)]
    )
    created = run_and_report(make(own_share), len(own_share), options.progress)
    cache.store.flush()
    options.meet()
    left = [] if alone else list_missing(cache, missing)
    deadline = time.monotonic() + PEER_TIMEOUT
    while left:
        if time.monotonic() > deadline:
            created += run_and_report(make(left), len(left), options.progress)
            break
        time.sleep(0.1)
        count, left = len(left), list_missing(cache, left)
        if len(left) < count:
            deadline = time.monotonic() + PEER_TIMEOUT
    cache.store.flush()
    return FillCounts(existing=len(keys) - len(missing), created=created)


def meet_nobody() -> None:
    """Where processes know of each other by the store alone."""


def belongs_to_part(bits: bytes, part: int, parts: int) -> bool:
    return int.from_bytes(bits, "little") % parts == part


def list_missing(cache: TensorCache, keys: Sequence[bytes]) -> list[bytes]:
    """The keys that are still missing after reading what other processes have added."""
    cache.store.refresh()
    return cache.find_missing(keys)


def run_and_report(work: Iterator[int], total: int, progress: FillProgress | None) -> int:
    """Run the work, which yields counts of created entries, and report its progress; returns the number of entries."""
    done = 0
    for more in work:
        done += more
        if progress is not None:
            progress(done, total)
    return done


@dataclass(frozen=True, kw_only=True)
class FillOptions:
    """How filling a cache is shared, checked and reported. Machines share no store and do not wait for each other."""

    rank: int = 0
    processes: int = 1  # of one machine, or of several with a common store
    machine: int = 0
    machines: int = 1
    check: bool = False  # whether to read the existing entries once, and create damaged ones again
    meet: Callable[[], object] = meet_nobody  # waits until all processes have created their share
    reference: CacheReference | None = None  # who needs the entries, stored so that pruning keeps them
    progress: FillProgress | None = None
    refuse: Callable[[int, int], UserError] | None = None  # missing, all -> the error, where nothing can be encoded


class FillCounts(NamedTuple):
    """Numbers of entries after filling a cache."""

    existing: int  # that existed before
    created: int  # by this process
