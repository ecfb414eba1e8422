"""Types of option values beyond the plain Python types, and their parsers."""

from __future__ import annotations

import ast
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, Strict

from sfumato.common.text import add_dot
from sfumato.config.base import Metavar
from sfumato.config.file_syntax import BACKSLASH_FIX

NEXT_ARGUMENT = re.compile(r"[\s,;][A-Za-z_]\w*=")
ARGUMENTS = "NAME=VALUE ..."  # the placeholder of options with arguments
PAIR_ARGUMENTS = ("network_reg_",)  # their values are pairs expression=value
MAX_PATH_BYTES = 4095
LARGEST_FLOAT32 = 3.4e38  # what weights are multiplied with has to fit there
MAX_NAME_BYTES = 160  # of 255: files add steps, endings and more
CONTROL_LETTER = re.compile(r"[\x01-\x1f]")


def to_tuple(value: Any) -> Any:
    """A single value stands for a list of one; TOML's arrays become tuples."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) else (value,)


def parse_resolution(value: Any) -> tuple[int, int]:
    """512, "512" or "512,768" -> (width, height) in pixels."""
    parts = value.split(",") if isinstance(value, str) else to_tuple(value)
    numbers = [parse_whole_number(part) for part in parts]
    if len(numbers) not in (1, 2) or any(number is None or number < 1 for number in numbers):
        raise ValueError("is not a size; write 512, or 512,768 for width and height")
    return numbers[0], numbers[-1]  # pyright: ignore[reportReturnType]


def parse_precision(name: str) -> str:
    """torch's name of a precision, from a name of sd-scripts or torch: bf16 -> bfloat16."""
    known = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
    precision = known.get(name.lower(), name.lower())
    if precision not in known.values():
        raise ValueError("is not a precision; write fp32, fp16 or bf16")
    return precision


def parse_steps(value: Any) -> int | float:
    """ "10%" or 0.1 -> 0.1, a share of all steps; 100 -> 100 steps. A share is a float, steps are an int."""
    text = str(value).strip()
    is_percentage = text.endswith("%")
    try:
        number = float(text[:-1]) / 100 if is_percentage else float(text)
    except ValueError:
        number = -1.0
    is_step_count = not is_percentage and number >= 0 and number == parse_whole_number(value)
    if isinstance(value, bool) or not (0 <= number <= 1 or is_step_count):
        raise ValueError("is neither a number of steps (100) nor a share of all steps (0.1 or 10%)")
    return number if number and (is_percentage or number < 1) else int(number)


def resolve_steps(steps: int | float, total: int) -> int:
    """Steps as a number: an int is returned unchanged, a float is a share of `total`, rounded down."""
    return steps if isinstance(steps, int) else int(steps * total)


def parse_learning_rates(value: Any) -> tuple[float, ...]:
    """ "1e-5,0,2e-5" or an array of numbers -> learning rates; on a command line they are one text."""
    parts = value.split(",") if isinstance(value, str) else to_tuple(value)
    try:
        learning_rates = tuple(float(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        learning_rates = (-1.0,)
    if not all(0 <= lr < math.inf for lr in learning_rates) or any(isinstance(part, bool) for part in parts):
        raise ValueError("is not a list of learning rates; write numbers from 0, separated by commas, e.g. 1e-5,0")
    return learning_rates


def parse_range(value: Any) -> tuple[float, float]:
    """ "2.0,4.0" or [2.0, 4.0] -> (2.0, 4.0), smaller first."""
    parts = value.split(",") if isinstance(value, str) else to_tuple(value)
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high:
        raise ValueError("is not a range; write two numbers, the smaller first, e.g. 2.0,4.0")
    return low, high


def parse_arguments(value: Any) -> dict[str, Any]:
    """["a=1", "b=0.9,0.99", "c=sine"] -> {"a": 1, "b": (0.9, 0.99), "c": "sine"}: Python literals, else text.

    Of a name that is given twice the last value counts.
    """
    if isinstance(value, dict):
        return value
    arguments: dict[str, Any] = {}
    for item in to_tuple(value):
        name, equals, text = str(item).partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ValueError(f"has {str(item)!r}, which is not of the form name=value")
        if NEXT_ARGUMENT.search(text) and not name.startswith(PAIR_ARGUMENTS) and parse_literal(text) == text:
            raise ValueError(
                f"has {str(item)!r}, which looks like several arguments in one; separate them with spaces, or as texts "
                "of a list in a file"
            )
        arguments[name] = parse_literal(strip_comma(text))
    return arguments


def list_repeated_names(value: Any) -> list[str]:
    """The names that a list of name=value has more than once."""
    names = [str(item).partition("=")[0].strip() for item in to_tuple(value)] if not isinstance(value, dict) else []
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def strip_comma(text: str) -> str:
    """Without the comma that separated the text from a next argument."""
    stripped = text.rstrip()
    return stripped.rstrip(",") if stripped.endswith(",") else text


def parse_literal(text: str) -> Any:
    """The Python value that a text spells (true and false in any case), or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes, e.g. in a regular expression
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text


def format_arguments(arguments: dict[str, Any]) -> list[str]:
    """The inverse of `parse_arguments`."""
    lines: list[str] = []
    for name, value in arguments.items():
        text = value if isinstance(value, str) else repr(value)
        is_plain = parse_literal(strip_comma(text)) == value and not NEXT_ARGUMENT.search(text)
        lines.append(f"{name}={text if is_plain or name.startswith(PAIR_ARGUMENTS) else repr(text)}")
    return lines


def parse_whole_number(value: Any) -> int | None:
    """The whole number of a value or its text, else None; true and false are not numbers."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number is not None and number.is_integer() else None


def check_seed(seed: int) -> int:
    """The seed, which must fit into 64 bits, with a sign or without."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError("does not fit into 64 bits; write a seed from 0 to 18446744073709551615")
    return seed


def check_file_name(name: str) -> str:
    """The name, whose last part must be possible for a file, and short enough for what is added to it."""
    last = get_last_part(name)
    if last in (".", "..") or (os.name == "nt" and re.search(r'[:*?"<>|]', last)):
        raise ValueError("is not a file name; give the folder with --output_dir and the name alone")
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name):
        raise ValueError("has letters that a file name cannot have")
    if len(last.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"is longer than {MAX_NAME_BYTES} bytes")
    return name


def get_last_part(name: str) -> str:
    """Of a name that may be a path."""
    return re.split(r"[/\\]" if os.name == "nt" else "/", name.rstrip("/" + os.sep))[-1].strip()


def parse_int_choice(value: Any) -> Any:
    """Integer choices, which are texts on a command line, as numbers."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


def parse_token_length(value: Any) -> Any:
    """75, which is one chunk and the default, becomes None."""
    return None if parse_int_choice(value) == 75 else parse_int_choice(value)


def parse_path(value: Any) -> Any:
    """The path with ~ expanded.

    An empty text is refused, because it would mean the current folder, and so is a path that does not exist with the
    tabs and line breaks that TOML makes of backslashes: "D:\\train\\new".
    """
    if value == "":
        raise ValueError("is empty; remove the option, or give a path")
    if is_impossible_name(str(value)):
        raise ValueError("is too long for a path, or has a NUL letter; check the value")
    if CONTROL_LETTER.search(str(value)) and not os.path.lexists(value):
        raise ValueError(f"has a tab, a line break or the like where a backslash was meant; {BACKSLASH_FIX}")
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  (keeps an unknown ~name)


def is_impossible_name(path: str) -> bool:
    """Whether no file system has such a path: looking for it would be an error of the system."""
    return "\0" in path or len(os.fsencode(path)) > MAX_PATH_BYTES or max(map(len, re.split(r"[/\\]", path))) > 255


def parse_shard(text: Any) -> tuple[int, int]:
    """`2/4` -> (1, 4): which part, from 0, of how many."""
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError("is not a part; write e.g. 1/4, 2/4, 3/4 and 4/4 for four machines")
    return int(match[1]) - 1, int(match[2])


FilePath = Annotated[Path, Strict(False), BeforeValidator(parse_path)]
MachineShard = Annotated[tuple[int, int], PlainValidator(parse_shard), Metavar("I/N")]
ModelPath = Annotated[str, BeforeValidator(parse_path), Metavar("PATH")]
ModelPaths = Annotated[tuple[ModelPath, ...], BeforeValidator(to_tuple), Metavar("PATH ...")]
FilePaths = Annotated[tuple[FilePath, ...], BeforeValidator(to_tuple), Metavar("PATH ...")]
LearningRates = Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(to_tuple), Metavar("X ...")]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(to_tuple), Metavar("N ...")]
Float32 = Annotated[float, Field(ge=-LARGEST_FLOAT32, le=LARGEST_FLOAT32)]
Floats = Annotated[tuple[Float32, ...], BeforeValidator(to_tuple), Metavar("X ...")]
Shares = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], BeforeValidator(to_tuple), Metavar("X ...")]
Resolution = Annotated[
    tuple[int, int],
    PlainValidator(parse_resolution),
    PlainSerializer(lambda size: f"{size[0]},{size[1]}"),
    Metavar("W,H"),
]
Range = Annotated[
    tuple[float, float], PlainValidator(parse_range), PlainSerializer(lambda r: f"{r[0]},{r[1]}"), Metavar("X,X")
]
LearningRateList = Annotated[
    Sequence[float],
    PlainValidator(parse_learning_rates),
    PlainSerializer(lambda r: ",".join(map(str, r))),
    Metavar("X,X,..."),
]
Extension = Annotated[str, AfterValidator(lambda extension: extension and add_dot(extension))]
FileName = Annotated[str, AfterValidator(check_file_name), Metavar("TEXT")]
Seed = Annotated[int, AfterValidator(check_seed)]
Steps = Annotated[int | float, PlainValidator(parse_steps), Metavar("N|X%")]
Arguments = Annotated[
    dict[str, Any], BeforeValidator(parse_arguments), PlainSerializer(format_arguments), Metavar(ARGUMENTS)
]
