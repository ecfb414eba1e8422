"""Reads the configuration file: TOML with free section names, or JSON, whose keys are option names.

As in sd-scripts, a file may hold more than options: what belongs to other programs, or says nothing, is ignored. One
line names all of it, and --strict refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.common.foreign_keys import foreign_kinds
from sfumato.common.kohya_gui import SavedForm, is_saved_form, read_saved_form
from sfumato.common.names import OPTION_ALIASES
from sfumato.common.registry import find_misspelled
from sfumato.config.config_text import find_line, read_config_table
from sfumato.config.file_values import is_not_given, is_plain_default, read_file_value
from sfumato.config.loose_keys import (
    COMMAND_LINE_KEY,
    EMPTY_KEY,
    OTHER_NAME,
    OTHER_VALUE,
    REPEATED_KEY,
    UNKNOWN_KEY,
    LooseKey,
)
from sfumato.config.option_source import OptionSource
from sfumato.config.schema import vocabulary
from sfumato.config.values import ARGUMENTS
from sfumato.errors import Problems

NOTHING = ("", None, False, 0, [])  # values of which nothing is lost if their key is ignored
COMMAND_LINE_ONLY = ("config_file", "output_config", "preset")  # options that are no keys of the file


@dataclass(frozen=True, kw_only=True)
class FileKey:
    """One key of a file, as it is written."""

    section: str  # empty for keys above all headings
    name: str
    value: Any


def resolve_config_path(name: Path) -> Path:
    """The path with .toml appended if it has no ending of ours, or with .json where only that file exists."""
    if name.suffix.lower() in (".toml", ".json"):
        return name
    toml, json = (name.with_name(name.name + suffix) for suffix in (".toml", ".json"))
    return json if json.exists() and not toml.exists() else toml


def read_config_file(path: Path, problems: Problems) -> OptionSource | None:
    """The values of the file in the options' types where their meaning is certain; None where it cannot be read.

    Typing errors, values without a certain meaning and sections inside sections are problems.
    """
    read = read_config_table(path, problems)
    if read is None:
        return None
    table, text = read
    source = OptionSource(source=path.name, typed=True)
    form = read_saved_form(table) if path.suffix.lower() == ".json" and is_saved_form(table) else None
    for key in list_form_keys(form) if form else iterate_keys(table):
        origin = form.origins.get(key.name, key.name) if form else key.name
        place = f"{path.name}:{find_line(text, origin, key.section)}: {origin}"
        if origin != key.name:
            source.loose.append(LooseKey(reason=OTHER_NAME, name=f"{origin} is {key.name}", place=place))
        store_key(key, place, source, problems)
    if form:
        report_form(form, path, text, source, problems)
    return source


def report_form(form: SavedForm, path: Path, text: str, source: OptionSource, problems: Problems) -> None:
    """Add what a saved form has without effect, and refuse words that only a command line takes."""
    for name, why in form.unused.items():
        place = f"{path.name}:{find_line(text, name, '')}: {name}"
        source.loose.append(LooseKey(reason=why, name=name, place=place))
    if form.words:
        place = f"{path.name}:{find_line(text, 'additional_parameters', '')}: additional_parameters"
        what = f"{place} are words of a command line"
        problems.add(what, code="config-key-with-words", fix="clear it, and append its words to the command")


def list_form_keys(form: SavedForm) -> list[FileKey]:
    """The keys of a saved form; what follows from several of them comes last."""
    return [FileKey(section="", name=name, value=value) for name, value in (form.rest | form.options).items()]


def iterate_keys(table: dict[str, Any]) -> Iterator[FileKey]:
    """Every key of the table and of its sections; a section that is called like an option with arguments is that."""
    for name, value in table.items():
        if isinstance(value, dict) and not is_argument_table(name, value):
            for inner, inner_value in value.items():
                yield FileKey(section=name, name=inner, value=inner_value)
        else:
            yield FileKey(section="", name=name, value=value)


def is_argument_table(name: str, table: dict[str, Any]) -> bool:
    """Whether e.g. [optimizer_args] holds arguments, and is not a section of options that bears this name."""
    known = vocabulary()
    is_section = any(key in known or isinstance(value, dict) for key, value in table.items())
    return name in known and known[name].metavar == ARGUMENTS and not is_section


def store_key(key: FileKey, place: str, source: OptionSource, problems: Problems) -> None:
    """Store one key where it is an option with a value; else it becomes a loose key or a problem."""
    name = OPTION_ALIASES.get(key.name, key.name)
    option = vocabulary().get(name)
    if name in COMMAND_LINE_ONLY:
        if key.value:
            source.loose.append(LooseKey(reason=COMMAND_LINE_KEY, name=name, place=place))
    elif option is None:
        store_other_key(key, place, source, problems)
    elif is_not_given(option, key.value):
        if not is_plain_default(option, key.value):
            source.loose.append(LooseKey(reason=EMPTY_KEY, name=name, place=place))
    else:
        if name in source.values:
            source.loose.append(LooseKey(reason=REPEATED_KEY, name=name, place=place))
        value = read_file_value(option, key.value)
        if is_changed(key.value, value):
            is_shown = type(value) is type(key.value) and not option.secret
            detail = f"{key.name} {key.value} is {value}" if is_shown else key.name
            source.loose.append(LooseKey(reason=OTHER_VALUE, name=detail, place=place))
        source.values[name] = value
        source.places[name] = place


def is_changed(written: Any, value: Any) -> bool:
    """Whether a value was read for another one; 1 is true, and a list is a tuple."""
    if isinstance(value, bool) and not isinstance(written, str):
        return False
    if isinstance(written, list) and isinstance(value, tuple):
        return False
    return type(written) is not type(value) or written != value


def store_other_key(key: FileKey, place: str, source: OptionSource, problems: Problems) -> None:
    """A key that is no option: known from elsewhere, or misspelled, or unknown."""
    if isinstance(key.value, dict) or key.name in ("datasets", "subsets"):
        what = f"{place} is a section inside a section"
        problems.add(what, code="config-section-nested", fix="datasets belong in the file of --dataset_config")
        return
    kind = foreign_kinds().get(key.name)
    meant = None if kind else find_misspelled(key.name, [*vocabulary(), *OPTION_ALIASES])
    if meant:
        meant = OPTION_ALIASES.get(meant, meant)
        source.suspects.add(meant)
        problems.add(f"{place} is not an option", code="config-key-misspelled", fix=f"did you mean {meant}?")
    elif key.value not in NOTHING:
        source.loose.append(LooseKey(reason=kind or UNKNOWN_KEY, name=key.name, place=place))
