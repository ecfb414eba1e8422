"""The configuration file: TOML whose section headings are free and whose keys are option names."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfumato.common.names import FOREIGN_KEYS, OPTION_ALIASES
from sfumato.config.layer import Layer, unknown
from sfumato.config.schema import vocabulary
from sfumato.errors import Problems

ELSEWHERE = {  # keys that are options, but not here
    "config_file": "a configuration file does not name another one",
    "output_config": "it belongs on the command line",
}


def config_path(name: Path) -> Path:
    return name if name.suffix == ".toml" else name.with_name(name.name + ".toml")


def read_config_file(path: Path, problems: Problems) -> Layer:
    """The file's values as TOML typed them; unknown keys, keys given twice and broken TOML are problems."""
    layer = Layer(source=path.name, typed=True)
    text = read_text(path, problems)
    if text is None:
        return layer
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problems.add(f"{path}: {reworded(str(error), text)}", fix=hint(text, error))
        return layer
    headings: dict[str, str] = {}
    for section, key, value in flattened(table):
        name = OPTION_ALIASES.get(key, key)
        place = f"{path.name}:{line_of(text, key, section)}: {key}"
        heading = f"[{section}]" if section else "the part above all sections"
        if name in headings:
            problems.add(f"{place} is given twice", fix=f"keep one of those in {headings[name]} and in {heading}")
        elif take(name, value, place, layer, problems):
            headings[name] = heading
    return layer


def read_text(path: Path, problems: Problems) -> str | None:
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.add(f"--config_file: cannot read {path} ({error.strerror})")
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problems.add(f"{path}:{line}: the file is not UTF-8", fix="save it again with the encoding UTF-8")
        return None


def flattened(table: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of every key; the section of those above all headings is empty."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from ((key, inner, content) for inner, content in value.items())
        else:
            yield "", key, value


def take(name: str, value: Any, place: str, layer: Layer, problems: Problems) -> bool:
    """Store one key; whether it was an option."""
    if name in ELSEWHERE:
        problems.add(f"{place} cannot be given here", fix=ELSEWHERE[name])
    elif name in vocabulary():
        if vocabulary()[name].kind == "flag" and type(value) is int and value in (0, 1):
            value = bool(value)
        layer.values[name] = value
        layer.places[name] = place
        return True
    elif name in FOREIGN_KEYS:
        layer.notes.append(f"{place} is ignored: {FOREIGN_KEYS[name]}")
    elif isinstance(value, dict) or name in ("datasets", "subsets"):
        problems.add(f"{place} is a section, but options have none inside", fix="datasets go into --dataset_config")
    else:
        unknown(place, name, layer, problems, write="{}")
    return False


def line_of(text: str, key: str, section: str) -> int:
    """Line on which a key of a section stands, 1 if it is written in an unusual way."""
    inside = ""
    for number, line in enumerate(text.splitlines(), start=1):
        heading = re.match(r"\s*\[+\s*[\"']?([^\]\"']+?)[\"']?\s*\]", line)
        if heading:
            inside = heading[1]
        elif inside == section and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return 1


def reworded(message: str, text: str) -> str:
    """tomllib's findings in words for people who did not write a parser."""
    words = {
        "Cannot overwrite a value": "a key is given twice",
        "Cannot declare": "a section is given twice: cannot declare",
        "at end of document": f"at line {len(text.rstrip().splitlines())}",
    }
    for theirs, ours in words.items():
        message = message.replace(theirs, ours)
    return message


def hint(text: str, error: tomllib.TOMLDecodeError) -> str:
    """What usually causes the fault on that line."""
    found = re.search(r"line (\d+)", str(error))
    line = text.splitlines()[int(found[1]) - 1] if found and int(found[1]) <= len(text.splitlines()) else ""
    if re.search(r'"[^"]*\\', line):
        return "in double quotes write \\\\ for one backslash, or use 'single quotes'"
    if re.search(r"=\s*(True|False)\b", line):
        return "TOML writes true and false in small letters"
    return ""
