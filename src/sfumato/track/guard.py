"""The door between training and what surrounds it: whatever fails behind it is a warning, and training goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sfumato.common.text import join_lines
from sfumato.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Failure:
    """What went wrong behind the door; empty where nothing did."""

    text: str = ""


class Guard:
    """Reports, previews, trackers and the like may fail in any way, also inside libraries; none of it is worth a run.

    Each kind of work is warned of once, with its traceback in the log file, and tried again when it is next due.
    """

    def __init__(self) -> None:
        self.warned: set[str] = set()

    @contextmanager
    def survive(self, what: str, *, then: str = ", training goes on") -> Iterator[Failure]:
        """Go on after any error inside, and keep its text. what, then: for the message, e.g. "writing the report"."""
        failure = Failure()
        try:
            yield failure
        except Exception as error:  # the only place that catches everything; see tests/house_rules.py
            failure.text = describe_any_error(error)
            if what not in self.warned:
                self.warned.add(what)
                log.warning("%s failed%s: %s", what, then, failure.text, exc_info=True)


def describe_any_error(error: Exception) -> str:
    """In one line; with its class where that says more than the text."""
    text = join_lines(error)
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")
