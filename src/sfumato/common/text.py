"""Small texts that several messages share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PureWindowsPath
from types import MappingProxyType
from typing import Any

GIB = 2**30  # bytes; a "24 GB" card has 24 of them, while format_bytes counts in 10^9
LONGEST_LINE = 160  # letters of a line that names many things
EMPTY: MappingProxyType[str, Any] = MappingProxyType({})  # a default for mappings that nobody changes
PATH_ROOT = r"(?:file://|~\w*|[A-Za-z]:)?[/\\](?!/)"
PATH_PATTERN = re.compile(rf"(?:^|(?<=[\s=,;:'\"\[({{])){PATH_ROOT}[^\s,;'\"\])}}]*[^\s,;'\"\])}}/\\][/\\]?")
WHOLE_PATH_PATTERN = re.compile(rf"{PATH_ROOT}[^,;'\"]*")  # may hold spaces


def format_bytes(count: float) -> str:
    """Three digits and a unit: "512 bytes", "34.1 kB", "6.94 GB"."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    number = 0
    while number < len(units) - 1 and float(f"{count:.3g}") >= 1000:
        count, number = count / 1000, number + 1
    return f"{count:.0f} bytes" if number == 0 else f"{count:.3g} {units[number]}"


def join_lines(text: object) -> str:
    """A text, or that of an error, as one line with single spaces."""
    return " ".join(str(text).split())


def list_some(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def plural(count: int, one: str, many: str = "") -> str:
    """A number and what is counted: "1 layer", "12,000 layers". many: where it is not `one` with an "s"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def join_parts(head: str, parts: Sequence[str]) -> str:
    """The parts after their head, in one line; a long one is wrapped before each part."""
    line = f"{head}{'; '.join(parts)}"
    return line if len(line) <= LONGEST_LINE else "\n    ".join([head.rstrip(), *parts])


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half of a letter, which no tokenizer and no UTF-8 file can take: "\\ud83d" of JSON, or bytes
    of a command line or a file name that are not UTF-8.
    """
    try:
        return not text.isascii() and not text.encode()
    except UnicodeEncodeError:
        return True


def strip_paths(text: str) -> str:
    """The text with every absolute or home-relative path in it reduced to its last component."""
    if WHOLE_PATH_PATTERN.fullmatch(text):
        return PureWindowsPath(text).name or text  # it knows both kinds of slashes
    return PATH_PATTERN.sub(lambda match: PureWindowsPath(match[0]).name, text)


def add_dot(extension: str) -> str:
    """The ending of a file's name, which users give with and without its dot."""
    return extension if extension.startswith(".") else f".{extension}"
