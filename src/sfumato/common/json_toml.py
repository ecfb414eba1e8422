"""JSON and TOML from outside: every fault is a ValueError whose text can be shown, endless nesting and numbers too.

The parsers of the standard library leave RecursionError and a hint about Python's own settings for those.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any

DECODER = json.JSONDecoder()
TOO_DEEP = "it is nested too deeply"
DEEPEST = 100  # tables and lists in one another: no file of ours has ten
LONGEST_NUMBER = 4096  # bits: Python writes no number of thousands of digits, which hexadecimal ones may have
TOO_MANY_DIGITS = "a number in it has too many digits"

Pairs = list[tuple[str, Any]]


def decode_json(text: str | bytes, *, make_object: Callable[[Pairs], Any] | None = None) -> Any:
    """The content of a JSON text. ValueError (json.JSONDecodeError where a place is known) for any fault.

    make_object: from the members of an object; a dict, in which the last of equal names counts, by default.
    """
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(reword_number_error(error)) from None


def decode_json_value(text: str, start: int) -> tuple[Any, int]:
    """The value of a JSON text that begins at `start`, and where it ends. Errors as of `decode_json`."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError(TOO_DEEP, text, start) from None
    except ValueError as error:
        raise json.JSONDecodeError(reword_number_error(error), text, start) from None


def decode_toml(text: str) -> dict[str, Any]:
    """The content of a TOML text. ValueError (tomllib.TOMLDecodeError where a place is known) for any fault."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(reword_number_error(error)) from None
    check_extent(content)
    return content


def check_extent(content: Any) -> None:
    """Raise ValueError for values that cannot be shown: numbers of thousands of digits, endless nesting."""
    values = [(content, 0)]
    while values:
        value, depth = values.pop()
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
            raise ValueError(TOO_MANY_DIGITS)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        values += [(each, depth + 1) for each in inner]


def reword_number_error(error: ValueError) -> str:
    """Python's refusal of numbers with thousands of digits in plain words; other messages stay."""
    return TOO_MANY_DIGITS if "limit" in str(error) and "digits" in str(error) else str(error)
