"""The help texts of all commands, made from their options."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sfumato.common.text import EMPTY

if TYPE_CHECKING:
    from sfumato.config.base import Option, Options

HELP_FLAGS = ("--help", "-h")
INDENT, WIDEST_LINE, NARROWEST_HELP = 34, 120, 30  # characters


def asks_for_help(argv: Sequence[str]) -> bool:
    return any(word in HELP_FLAGS for word in argv)


def training_help(
    program: str, summary: str, *, absent: Collection[str] = (), own: Sequence[type[Options]] = ()
) -> str:
    """The help of a command that takes the vocabulary of training, but for the options in `absent`.

    own: themes with further options of the command.
    """
    from sfumato.config.option_table import group_options, make_option_table
    from sfumato.config.schema import theme_title, vocabulary

    options = [option for option in vocabulary().values() if option.name not in absent]
    lines = [
        f"usage: {program} [--option value ...] [--config_file run.toml]",
        "",
        summary,
        "Every option may also stand in the configuration file, e.g. network_dim = 16.",
        "Switches are turned off again with --no_NAME.",
        "With --plan, everything is checked and shown, and nothing is trained or written.",
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
    usage = [program, *(format_positional(option) for option in positionals)]
    usage += [f"{option.flag} {option.metavar}" for option in required]
    lines = [f"usage: {' '.join(usage)} [--option value ...]", "", inspect.cleandoc(themes[0].__doc__ or "")]
    lines += format_section("Arguments", positionals) if positionals else []
    lines += format_section("Options", named)
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
        usage, wrapped = f"{usage:<{INDENT}}{wrapped[0]}", wrapped[1:]
    return [usage, *(" " * INDENT + line for line in wrapped)]


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
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def line_width() -> int:
    """Characters of a line: those of the terminal, where it is not very wide."""
    return min(shutil.get_terminal_size().columns, WIDEST_LINE)
