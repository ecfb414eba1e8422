"""Keys and options that are ignored or read by their meaning, where --strict accepts none: one line for a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.common.text import join_parts
from sfumato.errors import Problems

EMPTY_KEY = "empty, false or 0"
COMMAND_LINE_KEY = "only on the command line"
UNKNOWN_KEY = "unknown"
REPEATED_KEY = "given again, the last counts"
OTHER_VALUE = "by their meaning"
OTHER_NAME = "under another name"
EMPTY_OPTION = "empty"
ZERO_OPTION = "0 for none"
SHORT_NAME = "shortened"
REPEATED_ARGUMENT = "arguments given again, the last counts"
READ_REASONS = (
    REPEATED_KEY,
    OTHER_VALUE,
    OTHER_NAME,
    SHORT_NAME,
    REPEATED_ARGUMENT,
)  # of keys that count; all others are ignored


@dataclass(frozen=True, kw_only=True)
class LooseKey:
    """One such key.

    reason: why it is ignored, or how it was read. name: as the line lists it, e.g. "optimizer is optimizer_type".
    place: where it stands.
    """

    reason: str
    name: str
    place: str


def describe_loose_keys(source: str, keys: Sequence[LooseKey]) -> list[str]:
    """At most one line that names all of them by reason; a long one is wrapped before each reason.

    source: the file, or "command line".
    """
    parts: list[str] = []
    for label, is_read in (("ignored", False), ("read", True)):
        for reason in dict.fromkeys(key.reason for key in keys if (key.reason in READ_REASONS) == is_read):
            names = dict.fromkeys(key.name for key in keys if key.reason == reason)
            parts.append(f"{label}, {reason}: {', '.join(names)}")
    return [join_parts(f"{source}: ", parts)] if parts else []


def refuse_loose_keys(keys: Sequence[LooseKey], problems: Problems) -> None:
    """What --strict says of them: each is an error."""
    for key in keys:
        problems.add(f"{key.place}: {key.reason}", code="refused-by-strict", fix="correct it, or remove --strict")
