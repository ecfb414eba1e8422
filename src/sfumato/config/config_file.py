"""Reads the configuration file: TOML with free section names, whose keys are option names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sfumato.common.json_toml import decode_toml
from sfumato.common.names import FOREIGN_KEYS, OPTION_ALIASES
from sfumato.common.text_files import read_text_file
from sfumato.config.base import Option
from sfumato.config.file_syntax import suggest_toml_fix
from sfumato.config.option_source import OptionSource, report_unknown
from sfumato.config.schema import THEMES, vocabulary
from sfumato.errors import Problems

COMMAND_LINE_ONLY = {  # options that are no keys of the file
    "config_file": "a configuration file cannot name another one",
    "output_config": "it belongs on the command line",
}


def resolve_config_path(name: Path) -> Path:
    """The path with .toml appended if it is missing."""
    return name if name.suffix == ".toml" else name.with_name(name.name + ".toml")


def read_config_file(path: Path, problems: Problems) -> OptionSource:
    """The values of the file in their TOML types; unknown keys, keys given twice and invalid TOML are problems."""
    source = OptionSource(source=path.name, typed=True)
    text = read_config_text(path, problems)
    if text is None:
        return source
    try:
        table = decode_toml(text)
    except ValueError as error:
        what = f"{path}: {reword_toml_error(str(error), text)}"
        problems.add(what, code="config-file-invalid-toml", fix=suggest_toml_fix(text, error))
        return source
    headings: dict[str, str] = {}
    empty: list[str] = []
    for section, key, value in iterate_keys(table):
        name = OPTION_ALIASES.get(key, key)
        if is_not_given(name, value):
            if value is not False:
                empty.append(name)
            continue
        place = f"{path.name}:{find_line(text, key, section)}: {key}"
        heading = f"[{section}]" if section else "the part above all sections"
        if name in headings:
            fix = f"keep one of those in {headings[name]} and in {heading}"
            problems.add(f"{place} is given twice", code="config-key-given-twice", fix=fix)
        elif store_key(name, value, place, source, problems):
            headings[name] = heading
    if empty:
        source.notes.append(f"{path.name}: empty or 0, so not given: {', '.join(empty)}")
    return source


def is_not_given(name: str, value: Any) -> bool:
    """Whether a key says what the option is without it: front ends write every option, as false, "" or 0."""
    option = vocabulary().get(name)
    if option is None:
        return False
    if isinstance(value, bool):
        return value is False and option.arity == "flag" and option.default is False
    return value == "" or (value == 0 and refuses_zero(option))


def refuses_zero(option: Option) -> bool:
    """Whether 0 is outside the limits of a number, so that it can only mean none."""
    try:
        THEMES[option.theme].model_validate({option.name: 0}, strict=False)
    except ValidationError as error:
        return error.errors()[0]["type"] in ("greater_than", "greater_than_equal")
    return False


def read_config_text(path: Path, problems: Problems) -> str | None:
    with problems.catch():
        try:
            return read_text_file(path)
        except OSError as error:
            problems.add(f"--config_file: cannot read {path} ({error.strerror})", code="config-file-unreadable")
    return None


def iterate_keys(table: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of every key; the section is empty for keys above all headings."""
    for key, value in table.items():
        if isinstance(value, dict):
            for inner_key, inner_value in value.items():
                yield key, inner_key, inner_value
        else:
            yield "", key, value


def store_key(name: str, value: Any, place: str, source: OptionSource, problems: Problems) -> bool:
    """Store one key; True if it is an option."""
    if name in COMMAND_LINE_ONLY:
        what = f"{place} cannot be given in a configuration file"
        problems.add(what, code="config-key-command-line-only", fix=COMMAND_LINE_ONLY[name])
    elif name in vocabulary():
        if vocabulary()[name].arity == "flag" and type(value) is int and value in (0, 1):
            value = bool(value)
        source.values[name] = value
        source.places[name] = place
        return True
    elif name in FOREIGN_KEYS:
        source.notes.append(f"{place} is ignored: {FOREIGN_KEYS[name]}")
    elif isinstance(value, dict) or name in ("datasets", "subsets"):
        what = f"{place} is a section inside a section"
        problems.add(what, code="config-section-nested", fix="datasets belong in the file of --dataset_config")
    else:
        report_unknown(place, name, source, problems, write="{}")
    return False


def find_line(text: str, key: str, section: str) -> int:
    """Number of the line with a key of a section; 1 if it is written in an unusual way."""
    inside = ""
    for number, line in enumerate(text.splitlines(), start=1):
        heading = re.match(r"\s*\[+\s*[\"']?([^\]\"']+?)[\"']?\s*\]", line)
        if heading:
            inside = heading[1]
        elif inside == section and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return number
    return 1


def reword_toml_error(message: str, text: str) -> str:
    """A message of tomllib in the words of a user."""
    replacements = {
        "Cannot overwrite a value": "a key is given twice",
        "Cannot declare": "a section is given twice: cannot declare",
        "at end of document": f"at line {len(text.rstrip().splitlines())}",
    }
    for original, replacement in replacements.items():
        message = message.replace(original, replacement)
    return message
