"""Prompt files for previews: .txt lines with options, .toml and .json, each read into the same Prompt."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sfumato.errors import UserError
from sfumato.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One picture to make; None means the family's own default."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int | None = None
    scale: float | None = None  # classifier-free guidance
    guidance_scale: float | None = None  # embedded guidance
    sample_sampler: str | None = None


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("scale", float),
    "g": ("guidance_scale", float),
    "ss": ("sample_sampler", str),
}
OPTION = re.compile(r"\s--(?=[A-Za-z]+\s)")


def parse_line(line: str, *, where: str) -> Prompt:
    """A prompt and its ` --x value` options; names match in any case, a repeated option's last value counts."""
    text, *options = OPTION.split(" " + line.strip())
    values: dict[str, Any] = {"prompt": text.strip()}
    for option in options:
        name, _, value = option.partition(" ")
        if name.lower() not in OPTIONS:
            raise UserError(f"{where}: unknown option --{name}", fix=did_you_mean(name, OPTIONS))
        field, kind = OPTIONS[name.lower()]
        try:
            values[field] = kind(value.strip())
        except ValueError as error:
            raise UserError(f"{where}: --{name} takes a {kind.__name__}, not {value.strip()!r}") from error
    return _checked(values, where)


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file; raises UserError that names file and line or entry."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt file {path} ({error})") from error
    readers = {".txt": _from_text, ".toml": _from_toml, ".json": _from_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a prompt file ends in .txt, .toml or .json")
    try:
        prompts = readers[path.suffix.lower()](text, str(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return prompts


def _from_text(text: str, where: str) -> list[Prompt]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if not line.startswith("#")]
    return [parse_line(line, where=f"{where}:{number}") for number, line in lines if line.strip()]


def _from_toml(text: str, where: str) -> list[Prompt]:
    """[prompt] holds defaults, [[prompt.subset]] the prompts; a subset's own values win."""
    table = tomllib.loads(text).get("prompt", {})
    defaults = {name: value for name, value in table.items() if name != "subset"}
    subsets = table.get("subset", [])
    return [_checked({**defaults, **each}, f"{where}: prompt.subset[{i}]") for i, each in enumerate(subsets)]


def _from_json(text: str, where: str) -> list[Prompt]:
    return [_checked(each, f"{where}[{i}]") for i, each in enumerate(json.loads(text))]


def _checked(values: Mapping[str, Any], where: str) -> Prompt:
    known = {field.name: str(field.type) for field in fields(Prompt)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where}: unknown key {name!r}", fix=did_you_mean(name, known))
        wanted = (str,) if "str" in known[name] else (int,) if "int" in known[name] else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{where}: {name} takes {known[name].removesuffix(' | None')}, not {value!r}")
    if "prompt" not in values:
        raise UserError(f"{where}: has no prompt")
    return Prompt(**values)
