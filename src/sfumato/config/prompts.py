"""Prompt files for previews: .txt lines with options, .toml and .json, each read into the same Prompt."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sfumato.common.registry import did_you_mean
from sfumato.errors import UserError

SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip
MOST_STEPS = 1000


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
    controlnet_image: str | None = None
    cfg_trunc_ratio: float | None = None  # classifier-free guidance only before this share of the way
    renorm_cfg: float | None = None  # longest a guided prediction may be, in lengths of the one for the prompt
    flow_shift: float | None = None  # how far a flow's steps are moved towards noise
    notes: tuple[str, ...] = ()  # what was left out of the file's words, and why

    def completed(self, usual: Mapping[str, Any]) -> Prompt:
        """With the values of `usual` where this prompt is silent."""
        silent = {name: value for name, value in usual.items() if vars(self)[name] in (None, "")}
        return replace(self, **silent)


@dataclass(frozen=True)
class LineOption:
    """What ` --x value` sets. `value`: what the value begins with; what follows that is left out."""

    field: str
    value: re.Pattern[str]
    kind: Callable[[str], Any]


def _above_zero(text: str) -> float:
    if not float(text) > 0:
        raise ValueError
    return float(text)


WHOLE, DECIMAL, ANY = re.compile(r"\d+"), re.compile(r"[\d.]+"), re.compile(r".+")
OPTIONS = {
    "n": LineOption("negative_prompt", ANY, str),
    "w": LineOption("width", WHOLE, int),
    "h": LineOption("height", WHOLE, int),
    "d": LineOption("seed", WHOLE, int),
    "s": LineOption("sample_steps", WHOLE, lambda text: min(max(int(text), 1), MOST_STEPS)),
    "l": LineOption("scale", DECIMAL, float),
    "g": LineOption("guidance_scale", DECIMAL, float),
    "ss": LineOption("sample_sampler", ANY, str.strip),
    "cn": LineOption("controlnet_image", ANY, str.strip),
    "ctr": LineOption("cfg_trunc_ratio", ANY, float),
    "rcfg": LineOption("renorm_cfg", ANY, float),
    "fs": LineOption("flow_shift", ANY, _above_zero),
}


def parse_line(line: str, *, where: str) -> Prompt:
    """A prompt and its ` --x value` options; names match in any case, a repeated option's last value counts.

    As everywhere in the field, what does not fit is left out and the rest holds; the prompt's notes name it. The words
    before the first option are never read as one.
    """
    text, *options = line.strip().split(" --")
    values: dict[str, Any] = {"prompt": text}
    notes: list[str] = []
    for option in options:
        name, _, value = option.partition(" ")
        if name.lower() not in OPTIONS:
            near = did_you_mean(name, OPTIONS) if name.isalpha() else "options are written ` --w 512`"
            notes.append(f"{where}: {f'--{option}'!r} is no option and is left out ({near})")
            continue
        known = OPTIONS[name.lower()]
        found = known.value.match(value)
        try:
            values |= {known.field: known.kind(found[0])} if found else {}
        except ValueError:
            found = None
        if not found:
            notes.append(f"{where}: --{name} {value!r} is no value for it and is left out")
        elif found.end() < len(value.rstrip()):
            notes.append(f"{where}: of --{name} {value!r} only {found[0]!r} is used")
    return _checked({**values, "notes": tuple(notes)}, where)


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file, in order; raises UserError that names file and line or entry."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt file {path} ({error})") from error
    readers = {".txt": _from_text, ".toml": _from_toml, ".json": _from_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a prompt file ends in .txt, .toml or .json")
    try:
        return readers[path.suffix.lower()](text, str(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _from_text(text: str, where: str) -> list[Prompt]:
    """A line a prompt; # in the first column makes a comment."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if not line.startswith("#")]
    return [parse_line(line, where=f"{where}:{number}") for number, line in lines if line.strip()]


def _from_toml(text: str, where: str) -> list[Prompt]:
    """[prompt] holds defaults, [[prompt.subset]] the prompts; a subset's own values win."""
    table = tomllib.loads(text).get("prompt", {})
    if not isinstance(table, dict) or not isinstance(table.get("subset"), list):
        raise UserError(f"{where}: holds no [[prompt.subset]]", fix="write one for each picture, with prompt = ...")
    defaults = {name: value for name, value in table.items() if name != "subset"}
    return [
        _checked(_known({**defaults, **each}, f"{where}: prompt.subset[{i}]"), f"{where}: prompt.subset[{i}]")
        for i, each in enumerate(table["subset"])
    ]


def _from_json(text: str, where: str) -> list[Prompt]:
    """A list of objects, and of texts that are read as lines of a .txt file."""
    entries = json.loads(text)
    if not isinstance(entries, list) or not all(isinstance(each, dict | str) for each in entries):
        raise UserError(f"{where}: holds no list of prompts", fix='write [{"prompt": "..."}, ...]')
    return [
        parse_line(each, where=f"{where}[{i}]")
        if isinstance(each, str)
        else _checked(_known(each, f"{where}[{i}]"), f"{where}[{i}]")
        for i, each in enumerate(entries)
    ]


def _known(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Without the keys that mean nothing here, which the notes name."""
    names = [field.name for field in fields(Prompt) if field.name != "notes"]
    foreign = [name for name in values if name not in (*names, "subset")]
    notes = tuple(
        f"{where}: {name} is no key of a prompt and is left out ({did_you_mean(name, names)})" for name in foreign
    )
    return {**{name: value for name, value in values.items() if name in names}, "notes": notes}


def _checked(values: Mapping[str, Any], where: str) -> Prompt:
    types = {field.name: str(field.type) for field in fields(Prompt) if field.name != "notes"}
    for name, kind in types.items():
        value = values.get(name)
        wanted = (str,) if "str" in kind else (int,) if "int" in kind else (int, float)
        if name in values and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise UserError(f"{where}: {name} takes {kind.removesuffix(' | None')}, not {value!r}")
    if "prompt" not in values:
        raise UserError(f"{where}: has no prompt")
    sampler = values.get("sample_sampler", SAMPLERS[0])
    if sampler not in SAMPLERS:
        raise UserError(f"{where}: unknown sampler {sampler!r}", fix=did_you_mean(sampler, SAMPLERS))
    small = [name for name in ("width", "height", "sample_steps") if values.get(name, 1) < 1]
    if small:
        raise UserError(f"{where}: {small[0]} is below 1")
    if values.get("flow_shift") is not None and not values["flow_shift"] > 0:
        raise UserError(f"{where}: flow_shift is not above 0")
    return Prompt(**values)
