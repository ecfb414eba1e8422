"""Main memory: what a step frees is there for the next one."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's mallopt
LARGEST = 2**31 - 1
MARGIN = 64 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep the blocks that are freed, instead of giving each back and fetching it anew, page by page.

    A step on the CPU allocates and frees the same activations every time; without this, touching fresh pages takes
    up to a third of it. Does nothing with another C library. Memory never falls below its peak afterwards.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    for name, value in ((M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, MARGIN)):
        library.mallopt(name, value)
