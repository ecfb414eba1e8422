"""The tags that a tagger model knows, in the order of its output, and how they are written in captions."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from sfumato.common.json_toml import decode_json
from sfumato.common.text import plural
from sfumato.common.text_files import read_text_file
from sfumato.errors import UserError

CSV_CATEGORIES = {"9": "rating", "0": "general", "4": "character"}  # WD14's selected_tags.csv; others are not used
CATEGORIES = ("rating", "quality", "general", "character", "copyright", "artist", "meta", "model")
MAX_OUTPUTS = 1_000_000  # of a model; those in use have 10,000 to 110,000
MAX_DIGITS = 20
SHORT_TAG = 3  # letters; tags up to it, faces like ^_^ and >_<, keep their underscores


@dataclass(frozen=True, kw_only=True)
class TagTable:
    """names, categories: of each output of the model. is_mapping: from a tag_mapping.json, whose models differ in more
    than their table: they take images in another layout and give logits.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    is_mapping: bool = False

    def rows(self, *categories: str) -> list[int]:
        """The outputs of some categories, in the table's order."""
        return [row for row, category in enumerate(self.categories) if category in categories]


@dataclass(frozen=True, kw_only=True)
class TagWriting:
    """How tags are written. replacements: tag -> what stands for it; "" removes it."""

    separator: str = ", "
    remove_underscore: bool = False
    expand_characters: bool = False
    replacements: Mapping[str, str]


def read_tag_table(path: Path) -> TagTable:
    """A selected_tags.csv or a tag_mapping.json. UserError where it is neither."""
    try:
        text = read_text_file(path)
        table = parse_mapping(text) if path.suffix.lower() == ".json" else parse_csv(text)
        fault = "" if table.names else "it has no tags"
    except (OSError, ValueError, csv.Error) as error:
        table, fault = TagTable(names=(), categories=()), str(error)
    if fault:
        raise UserError(
            f"{path} is no table of tags ({fault})",
            code="tag-table-invalid",
            fix="give the selected_tags.csv or the tag_mapping.json that belongs to the model",
        )
    return table


def parse_csv(text: str) -> TagTable:
    """The rows of a table with the columns `name` and `category`; without such a head there are none."""
    rows = [row for row in csv.DictReader(StringIO(text)) if row.get("name") and row.get("category") is not None]
    names = tuple(row["name"] for row in rows)
    return TagTable(names=names, categories=tuple(CSV_CATEGORIES.get(row["category"], "") for row in rows))


def parse_mapping(text: str) -> TagTable:
    """{output: {"tag": ..., "category": ...}}; an output that is left out has no tag. ValueError where it is none."""
    mapping = decode_json(text)
    rows: dict[int, tuple[str, str]] = {}
    for key, entry in mapping.items() if isinstance(mapping, dict) else ():
        if not key.isdecimal() or int(key[:MAX_DIGITS]) > MAX_OUTPUTS or not isinstance(entry, dict):
            raise ValueError(f"{key[:MAX_DIGITS]!r} is no output with a tag and its category")
        category = str(entry.get("category", "")).lower()
        rows[int(key)] = str(entry.get("tag", "")), category if category in CATEGORIES else ""
    ordered = [rows.get(i, ("", "")) for i in range(max(rows, default=-1) + 1)]
    return TagTable(names=tuple(n for n, _ in ordered), categories=tuple(c for _, c in ordered), is_mapping=True)


def write_tags(table: TagTable, writing: TagWriting) -> TagTable:
    """The table with its tags as captions have them.

    Of a CSV table characters are expanded first, so that replacements meet what stands in captions; the models with a
    mapping are used with the replacement before (both as in sd-scripts).
    """
    if table.is_mapping:
        steps = (remove_underscores, replace_tags, expand_characters)
    else:
        steps = (expand_characters, remove_underscores, replace_tags)
    for step in steps:
        table = replace(table, names=tuple(step(table, writing)))
    return table


def expand_characters(table: TagTable, writing: TagWriting) -> list[str]:
    """name_(series) as two tags; of several brackets the last, so that name_(costume) stays one."""
    names = list(table.names)
    for row in table.rows("character") if writing.expand_characters else ():
        if match := re.fullmatch(r"(.+?)[_ ]?\(([^()]+)\)", names[row]):
            names[row] = f"{match[1]}{writing.separator}{match[2]}"
    return names


def remove_underscores(table: TagTable, writing: TagWriting) -> list[str]:
    if not writing.remove_underscore:
        return list(table.names)
    return [name.replace("_", " ") if len(name) > SHORT_TAG else name for name in table.names]


def replace_tags(table: TagTable, writing: TagWriting) -> list[str]:
    return [writing.replacements.get(name, name) for name in table.names]


def parse_replacements(text: str) -> dict[str, str]:
    """`old,new;old,new`, where \\, and \\; stand for a comma and a semicolon. UserError for anything else."""
    replacements: dict[str, str] = {}
    for pair in filter(str.strip, split_escaped(text, ";")):
        parts = split_escaped(pair, ",")
        if len(parts) != 2 or not parts[0].strip():
            raise UserError(
                f"--tag_replacement: {pair!r} is not a pair old,new",
                code="tag-replacement-invalid",
                fix=r"write old,new;old,new with \, and \; for commas and semicolons inside of tags",
            )
        old, new = (re.sub(r"\\([,;])", r"\1", part).strip() for part in parts)
        replacements[old] = new
    return replacements


def split_escaped(text: str, separator: str) -> list[str]:
    """The parts between separators that no backslash stands before."""
    return re.split(rf"(?<!\\){separator}", text)


def split_tag_list(text: str, separator: str) -> list[str]:
    """The tags of a list, which is split as sd-scripts does: at the separator without its spaces."""
    return [tag.strip() for tag in text.split(separator.strip() or separator) if tag.strip()]


def check_outputs(table: TagTable, outputs: int, path: Path) -> None:
    """UserError where the model has another number of outputs than the table has tags."""
    if len(table.names) != outputs:
        raise UserError(
            f"{path} has {plural(len(table.names), 'tag')}, the model gives {outputs:,}",
            code="tag-table-of-other-model",
            fix="give the table that belongs to the model",
        )
