"""Values of configuration files: what means "not given", and texts and numbers of another type with one meaning.

sd-scripts checks types on its command line alone; what stands in a file replaces the checked values.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from sfumato.config.base import Option
from sfumato.config.schema import THEMES
from sfumato.config.values import ARGUMENTS

PERIODS = ("sample_every_n_steps", "sample_every_n_epochs")  # zero and below mean never
OTHER_VALUES = {("max_token_length", "255"): 225}  # 3 chunks, as sd-scripts reads the default of a front end


def is_not_given(option: Option, value: Any) -> bool:
    """Whether a value says what the option is if it is not given: null, false, an empty text, or 0 that is no value."""
    if isinstance(value, str) and option.metavar != "TEXT":
        value = value.strip()
        value = {"true": True, "false": False}.get(value.lower(), value) if option.arity == "flag" else value
    if isinstance(value, bool):
        return not value and not (option.arity == "flag" and option.default is True)
    if isinstance(value, list):
        return all(item in ("", None) for item in value)
    return value in ("", None) or is_zero_for_none(option, value)


def is_plain_default(option: Option, value: Any) -> bool:
    """Whether nothing is lost where this is not given: a switch that is off, an empty list, null."""
    return value is None or value == [] or (option.arity == "flag" and value is False)


def is_zero_for_none(option: Option, value: Any) -> bool:
    """Whether a value is 0 where that can only mean "not given"."""
    return is_zero(value) and (option.name in PERIODS or not can_be_zero(option))


def is_zero(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and float(value) == 0
    except (TypeError, ValueError, OverflowError):  # the last of a whole number beyond all floats
        return False


def can_be_zero(option: Option) -> bool:
    """False where 0 is outside the limits of a number, so that it can only mean none."""
    try:
        convert(option, 0)
    except ValidationError as error:
        return error.errors()[0]["type"] not in ("greater_than", "greater_than_equal")
    return True


def convert(option: Option, value: Any, *, strict: bool = False) -> Any:
    """The value in the option's type; pydantic's ValidationError where it has none. strict: texts are no numbers."""
    theme = THEMES[option.theme].model_validate({option.name: value}, strict=None if strict else False)
    return getattr(theme, option.name)


def read_file_value(option: Option, value: Any) -> Any:
    """The value in a form that the option takes, where its meaning is certain; else the value itself."""
    is_switch_value = isinstance(value, bool) and option.arity != "flag"  # pydantic would read true for 1
    with suppress(ValidationError):
        convert(option, value, strict=True)
        return value
    for other in () if is_switch_value else other_forms(option, value):
        with suppress(ValidationError):
            return convert(option, other)
    return value


def other_forms(option: Option, value: Any) -> Iterator[Any]:
    """The forms that a value of another type may have meant, the likely one first."""
    meant = OTHER_VALUES.get((option.name, str(value).strip().removesuffix(".0")))
    if meant is not None:
        yield meant
    yield value
    if isinstance(value, list) and len(value) == 1 and option.arity != "many":
        yield value[0]
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, str):
        yield from (choice for choice in option.choices if choice.lower() == value.strip().lower())
        if is_whole(value):
            yield int(float(value))
        if option.arity == "many":
            yield split_text(option, value)


def is_whole(text: str) -> bool:
    """Whether a text is a whole number that int() does not read, e.g. "1e3"."""
    try:
        return float(text).is_integer() and abs(float(text)) < 2**53
    except ValueError:
        return False


def split_text(option: Option, text: str) -> list[str]:
    """The items of a list that is one text: at spaces for name=value, at lines for paths, at commas for numbers."""
    if option.metavar == ARGUMENTS:
        return split_arguments(text)
    if option.metavar.startswith("PATH"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    return re.findall(r"[^\s,;\[\]()]+", text)


def split_arguments(text: str) -> list[str]:
    """The arguments of a text; a word without = continues the value before it: "betas=0.9, 0.99 eps=1e-8"."""
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.commenters, words.escape = True, "", ""
    try:
        found = list(words)
    except ValueError:  # a quotation mark that does not end
        found = text.split()
    items: list[str] = []
    for word in found:
        if "=" in word or not items:
            items.append(word)
        else:
            items[-1] += word
    return items
