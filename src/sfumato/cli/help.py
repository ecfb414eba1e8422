"""The help texts of all commands, made from their options."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sfumato.common.text import EMPTY

if TYPE_CHECKING:
    from sfumato.config.base import Option, Options

HELP_FLAGS = ("--help", "-h")
INDENT, CONTINUED, WIDEST_LINE, NARROWEST_HELP = 34, 6, 120, 30  # characters


def asks_for_help(argv: Sequence[str]) -> bool:
    return any(word in HELP_FLAGS for word in argv)


def training_help(
    program: str, summary: str, *, absent: Collection[str] = (), own: Sequence[type[Options]] = ()
) -> str:
    """The help of a command that takes the vocabulary of training, but for the options in `absent`.

    summary: sentences, each on a line of its own. own: themes with further options of the command.
    """
    from sfumato.config.option_table import group_options, make_option_table
    from sfumato.config.schema import theme_title, vocabulary

    options = [option for option in vocabulary().values() if option.name not in absent]
    lines = [
        *format_usage(program, ["[--option value ...]", "[--config_file run.toml]"]),
        "",
        *wrap_lines(summary),
        "Every option may also stand in the configuration file, e.g. network_dim = 16.",
        "Switches are turned off again with --no_NAME.",
    ]
    for theme in own:
        table = make_option_table({theme.__name__: theme})
        lines += format_section(f"Options of `{program}`", table.options.values())
    for theme, group in group_options(options).items():
        lines += format_section(theme_title(theme), group)
    return "\n".join(lines) + "\n"


def command_help(
    program: str,
    *themes: type[Options],
    highlights: Collection[str] = (),
    aliases: Mapping[str, str] = EMPTY,
) -> str:
    """The help of a command with options of its own; the docstring of its first theme describes it.

    highlights: the options of training that matter most to it. aliases: other spellings of these.
    """
    from sfumato.config.option_table import make_option_table
    from sfumato.config.schema import vocabulary

    own = make_option_table({theme.__name__: theme for theme in themes})
    named, positionals = list(own.options.values()), list(own.positionals.values())
    required = [option for option in named if option.facts.required]
    usage = [format_positional(option) for option in positionals]
    usage += [f"{option.flag} {option.metavar}" for option in required]
    lines = [*format_usage(program, [*usage, "[--option value ...]"]), ""]
    lines += wrap_paragraphs(inspect.cleandoc(themes[0].__doc__ or ""))
    lines += format_section("Arguments", positionals) if positionals else []
    lines += format_section("Options", named) if named else []
    if highlights:
        shared = [vocabulary()[name] for name in highlights]
        lines += format_section("Of the options of `sfumato train`, above all", shared, aliases)
    return "\n".join(lines) + "\n"


def format_section(heading: str, options: Iterable[Option], aliases: Mapping[str, str] = EMPTY) -> list[str]:
    """A heading and its options."""
    lines = ["", f"{heading}:"]
    for option in options:
        spellings = [f"--{alias}" for alias, name in aliases.items() if name == option.name]
        lines += format_option(option, spellings)
    return lines


def format_option(option: Option, spellings: Sequence[str] = ()) -> list[str]:
    """One option: its name and its value on the left, its help and default on the right."""
    usage = f"  {option.flag} {format_metavar(option)}".rstrip()
    width = line_width()
    wrapped = textwrap.wrap(describe_option(option, spellings), max(width - INDENT, NARROWEST_HELP))
    if len(usage) < INDENT - 1:
        return [f"{usage:<{INDENT}}{wrapped[0]}", *(" " * INDENT + line for line in wrapped[1:])]
    return [*wrap_choices(usage, width), *(" " * INDENT + line for line in wrapped)]


def wrap_choices(usage: str, width: int) -> list[str]:
    """An option with many values in several lines, of which all but the last end in |."""
    lines = [""]
    for piece in re.findall(r"[^|]+\|?", usage):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append(" " * CONTINUED)
        lines[-1] += piece
    return lines


def format_metavar(option: Option) -> str:
    """The placeholder of an option's value; nothing for a positional argument, whose name is its placeholder."""
    return "" if option.facts.positional else "|".join(option.choices) or option.metavar


def format_positional(option: Option) -> str:
    text = f"{option.flag} ..." if option.arity == "many" else option.flag
    return text if option.facts.required else f"[{text}]"


def describe_option(option: Option, spellings: Sequence[str]) -> str:
    """Its help line, then what else there is to know."""
    parts = [option.help]
    if spellings:
        parts.append(f"(also {', '.join(spellings)})")
    if option.facts.no_effect:
        parts.append(f"(no effect: {option.facts.no_effect})")
    if option.arity != "flag" and option.default not in (None, "", (), {}):
        parts.append(f"[default: {format_default(option)}]")
    return " ".join(parts)


def format_default(option: Option) -> str:
    """As it would be given; in quotes where it is signs and spaces alone, e.g. a separator."""
    values = option.default if isinstance(option.default, tuple) else (option.default,)
    text = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return text if any(map(str.isalnum, text)) else f'"{text}"'


def format_usage(program: str, words: Sequence[str]) -> list[str]:
    """The first lines of a help text."""
    lines = [f"usage: {program}"]
    for word in words:
        if len(f"{lines[-1]} {word}") > line_width():
            lines.append(" " * CONTINUED)
        lines[-1] += f" {word}"
    return lines


def wrap_lines(text: str) -> list[str]:
    """Each line of a text by itself, in lines that fit."""
    return [short for line in text.splitlines() for short in textwrap.wrap(line, line_width()) or [""]]


def wrap_paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring in lines that fit; those that are indented stay as they are."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        own = paragraph.splitlines()
        lines += [
            "",
            *(own if paragraph.startswith(" ") else textwrap.wrap(" ".join(own), line_width(), break_on_hyphens=False)),
        ]
    return lines[1:]


def format_names(names: Mapping[str, str]) -> list[str]:
    """A table of names and what they are."""
    column = max(10, *(len(name) + 2 for name in names))
    width = max(line_width() - column - 2, NARROWEST_HELP)
    lines: list[str] = []
    for name, description in names.items():
        first, *others = textwrap.wrap(description, width)
        lines += [f"  {name:<{column}}{first}", *(" " * (column + 2) + line for line in others)]
    return lines


def line_width() -> int:
    """Characters of a line: those of the terminal, where it is not very wide."""
    return min(shutil.get_terminal_size().columns, WIDEST_LINE)
