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
    text = str(error.__cause__ or error).strip() or str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
