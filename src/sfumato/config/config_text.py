"""The text of a configuration file, TOML or JSON, as a table of values, with the lines that its keys stand on."""

from __future__ import annotations

import re
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from sfumato.common.json_toml import decode_json, decode_toml
from sfumato.common.text_files import read_text_file
from sfumato.config.file_syntax import suggest_json_fix, suggest_toml_fix
from sfumato.errors import Problems, UserError


def read_config_table(path: Path, problems: Problems) -> tuple[dict[str, Any], str] | None:
    """(table, text) of a file; None where it cannot be read, which becomes a problem."""
    with problems.catch():
        try:
            text = read_text_file(path)
        except OSError as error:
            what = f"--config_file: cannot read {path} ({error.strerror})"
            raise UserError(what, code="config-file-unreadable") from error
        return (load_json if path.suffix.lower() == ".json" else load_toml)(text, path), text
    return None


def load_toml(text: str, path: Path) -> dict[str, Any]:
    try:
        return decode_toml(text)
    except ValueError as error:
        what = f"{path}: {reword_toml_error(str(error), text)}"
        raise UserError(what, code="config-file-invalid-toml", fix=suggest_toml_fix(text, error)) from error


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


def load_json(text: str, path: Path) -> dict[str, Any]:
    """UserError for what is no JSON, no object, or has a key twice in one object."""

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        twice = [key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index])]
        if twice:
            line = [n for n, row in enumerate(text.splitlines(), 1) if re.search(rf'"{re.escape(twice[0])}"\s*:', row)]
            place = f"{path.name}:{line[-1] if line else 1}: {twice[0]}"
            raise UserError(f"{place} is given twice", code="config-key-given-twice", fix="keep one of them")
        return table

    try:
        table = decode_json(text, make_object=make_object)
    except ValueError as error:
        what = f"{path}: {describe_json_error(error)}"
        raise UserError(what, code="config-file-invalid-json", fix=suggest_json_fix(error, text)) from error
    if not isinstance(table, dict):
        what = f"{path} is a JSON file, but no object of options"
        raise UserError(what, code="config-file-no-object", fix='write {"option": value, ...}')
    return table


def describe_json_error(error: ValueError) -> str:
    """What is wrong, and where if that is known."""
    if isinstance(error, JSONDecodeError):
        return f"{error.msg} (at line {error.lineno}, column {error.colno})"
    return str(error)


def find_line(text: str, key: str, section: str) -> int:
    """Number of the line with a key of a section; 1 if it is written in an unusual way."""
    inside, name, heading = "", re.escape(key), re.compile(r"\s*\[+\s*[\"']?([^\]\"']+?)[\"']?\s*\]")
    toml_key, json_key = re.compile(rf"\s*[\"']?{name}[\"']?\s*="), re.compile(rf'"{name}"\s*:')
    for number, line in enumerate(text.splitlines(), start=1):
        title = heading.match(line)
        if title:
            inside = title[1]
        elif (inside == section and toml_key.match(line)) or json_key.search(line):
            return number
    return 1
