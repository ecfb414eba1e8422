"""The types of option values that plain Python types do not say."""

from __future__ import annotations

import ast
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, Strict

from sfumato.config.base import Shown


def as_tuple(value: Any) -> Any:
    """A single value stands for a list of one; TOML's arrays become tuples."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) else (value,)


def as_size(value: Any) -> tuple[int, int]:
    """512, "512" or "512,768" -> (width, height) in pixels."""
    parts = value.split(",") if isinstance(value, str) else as_tuple(value)
    numbers = [whole(part) for part in parts]
    if len(numbers) not in (1, 2) or any(number is None or number < 1 for number in numbers):
        raise ValueError("is not a size; write 512, or 512,768 for width and height")
    return numbers[0], numbers[-1]  # pyright: ignore[reportReturnType]


def as_precision(name: str) -> str:
    """torch's name of a precision, from any that the field uses: bf16 -> bfloat16."""
    known = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
    found = known.get(name.lower(), name.lower())
    if found not in known.values():
        raise ValueError("is not a precision; write fp32, fp16 or bf16")
    return found


def as_steps(value: Any) -> int | float:
    """ "10%" or 0.1 -> 0.1, a share of all steps; 100 -> 100 steps. The type tells them apart."""
    text = str(value).strip()
    share = text.endswith("%")
    try:
        number = float(text[:-1]) / 100 if share else float(text)
    except ValueError:
        number = -1.0
    fits = 0 <= number <= 1 or (not share and number >= 0 and number == whole(value))
    if isinstance(value, bool) or not fits:
        raise ValueError("is neither a number of steps (100) nor a share of all steps (0.1 or 10%)")
    return number if number and (share or number < 1) else int(number)


def step_count(steps: int | float, total: int) -> int:
    """How many of `total` steps are meant: a whole number as it is, a share rounded down."""
    return steps if isinstance(steps, int) else int(steps * total)


def as_rates(value: Any) -> tuple[float, ...]:
    """ "1e-5,0,2e-5" or an array of numbers -> learning rates; those of a command line stand in one text."""
    parts = value.split(",") if isinstance(value, str) else as_tuple(value)
    try:
        rates = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        rates = (-1.0,)
    if not all(0 <= rate < math.inf for rate in rates) or any(isinstance(part, bool) for part in parts):
        raise ValueError("is not a list of learning rates; write numbers from 0 with commas between them, as 1e-5,0")
    return rates


def as_range(value: Any) -> tuple[float, float]:
    """ "2.0,4.0" or [2.0, 4.0] -> (2.0, 4.0), smaller first."""
    parts = value.split(",") if isinstance(value, str) else as_tuple(value)
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high:
        raise ValueError("is not a range; write two numbers, the smaller first, as 2.0,4.0")
    return low, high


def as_arguments(value: Any) -> dict[str, Any]:
    """["a=1", "b=0.9,0.99", "c=sine"] -> {"a": 1, "b": (0.9, 0.99), "c": "sine"}: Python literals, else text."""
    if isinstance(value, dict):
        return value
    arguments: dict[str, Any] = {}
    for item in as_tuple(value):
        name, equals, text = str(item).partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ValueError(f"has {str(item)!r}, which is not of the form name=value")
        if name in arguments:
            raise ValueError(f"has {name!r} twice")
        if re.search(r"\s[A-Za-z_]\w*=", text):
            raise ValueError(f"has {str(item)!r}, which looks like several arguments in one; separate them")
        arguments[name] = literal(text)
    return arguments


def literal(text: str) -> Any:
    """The Python value that a text spells (true and false in any case), or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a text with \. in it is no Python to complain about
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text


def spelled(arguments: dict[str, Any]) -> list[str]:
    """The inverse of `as_arguments`."""
    plain = {name: value if isinstance(value, str) else repr(value) for name, value in arguments.items()}
    return [f"{name}={text if literal(text) == arguments[name] else repr(text)}" for name, text in plain.items()]


def whole(value: Any) -> int | None:
    """The whole number that a value is or spells, else None; true and false are not numbers."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number is not None and number.is_integer() else None


def as_whole_choice(value: Any) -> Any:
    """Choices that are whole numbers arrive as text from a command line."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


def as_token_length(value: Any) -> Any:
    """75 is what one chunk holds, so it is the same as not asking for more."""
    return None if as_whole_choice(value) == 75 else as_whole_choice(value)


def as_path(value: Any) -> Any:
    """Expands ~; an empty text would quietly mean the current folder."""
    if value == "":
        raise ValueError("is empty; leave the option out, or give a path")
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  (keeps an unknown ~name)


FilePath = Annotated[Path, Strict(False), BeforeValidator(as_path)]
ModelPath = Annotated[str, BeforeValidator(as_path), Shown("PATH")]
ModelPaths = Annotated[tuple[ModelPath, ...], BeforeValidator(as_tuple), Shown("PATH ...")]
FilePaths = Annotated[tuple[FilePath, ...], BeforeValidator(as_tuple), Shown("PATH ...")]
Rates = Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(as_tuple), Shown("X ...")]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(as_tuple), Shown("N ...")]
Floats = Annotated[tuple[float, ...], BeforeValidator(as_tuple), Shown("X ...")]
Size = Annotated[
    tuple[int, int], PlainValidator(as_size), PlainSerializer(lambda size: f"{size[0]},{size[1]}"), Shown("W,H")
]
Range = Annotated[
    tuple[float, float], PlainValidator(as_range), PlainSerializer(lambda r: f"{r[0]},{r[1]}"), Shown("X,X")
]
RateList = Annotated[
    Sequence[float], PlainValidator(as_rates), PlainSerializer(lambda r: ",".join(map(str, r))), Shown("X,X,...")
]
Steps = Annotated[int | float, PlainValidator(as_steps), Shown("N|X%")]
Arguments = Annotated[dict[str, Any], BeforeValidator(as_arguments), PlainSerializer(spelled), Shown("NAME=VALUE ...")]
