"""Calls of a library whose errors share no class of their own, such as those of a client for the web."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def call_library(work: Callable[[], _T]) -> Future[_T]:
    """A future that is done, with the result or with what was raised, of whatever class. Ctrl-C passes through."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work)


def give_reason(error: BaseException) -> str:
    """The first line of an error, or of the one that it only wraps."""
    cause = error.__cause__
    return read_first_line(cause if cause is not None and str(cause).strip() else error)


def read_first_line(error: BaseException) -> str:
    """Of an error's text; the name of its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
