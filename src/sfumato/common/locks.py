"""Locks of the operating system on files: they end with their process, however it ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def lock_file(descriptor: int, *, exclusive: bool, wait: bool) -> bool:
    """Lock a file, shared or exclusive, until the process ends or closes it; False if another process prevents it.

    On Windows and on file systems without locks nothing is locked and the result is True.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def is_abandoned(path: Path) -> bool:
    """Whether the process that locked this file exclusively has ended; False where that cannot be known."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def lock_for_process(descriptor: int) -> bool:
    """Lock a file for this process as a whole, also over a network; False if another process has it.

    Where the file system has no locks the result is True.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # one of them, by system
        return False
    except OSError:
        return True
    return True
