"""The help text of a command that takes the vocabulary: grouped by theme, what is still to come at the end."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection

from sfumato.config.base import Option
from sfumato.config.schema import by_theme, title, vocabulary

INDENT = 34


def help_text(program: str, summary: str, *, without: Collection[str] = ()) -> str:
    """Usage, then every option but those in `without`, wrapped to the terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    options = [option for option in vocabulary().values() if option.name not in without]
    lines = [
        f"usage: {program} [--option value ...] [--config_file run.toml]",
        "",
        summary,
        "Every option may also stand in the configuration file, as network_dim = 16.",
        "Switches are turned off again with --no_NAME.",
    ]
    for theme, group in by_theme(option for option in options if not option.facts.planned).items():
        lines += ["", f"{title(theme)}:"]
        for option in group:
            lines += entry(option, width)
    return "\n".join([*lines, *to_come(options, width)]) + "\n"


def entry(option: Option, width: int) -> list[str]:
    """One option: its name and what it takes on the left, its help and default on the right."""
    usage = f"  {option.flag} {shown_choices(option)}".rstrip()
    wrapped = textwrap.wrap(described(option), max(width - INDENT, 30))
    if len(usage) < INDENT - 1:
        usage, wrapped = f"{usage:<{INDENT}}{wrapped[0]}", wrapped[1:]
    return [usage, *(" " * INDENT + line for line in wrapped)]


def shown_choices(option: Option) -> str:
    """The placeholder of its value."""
    return "|".join(option.choices) or option.takes


def described(option: Option) -> str:
    parts = [option.help]
    if option.facts.no_effect:
        parts.append(f"(no effect: {option.facts.no_effect})")
    if option.kind != "flag" and option.default not in (None, "", (), {}):
        parts.append(f"[default: {default_text(option)}]")
    return " ".join(parts)


def default_text(option: Option) -> str:
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def to_come(options: list[Option], width: int) -> list[str]:
    """Options that are known but refused until their room is there."""
    rooms: dict[str, list[str]] = {}
    for option in options:
        if option.facts.planned:
            rooms.setdefault(option.facts.planned, []).append(option.flag)
    lines = ["", "Known, but not available yet:"] if rooms else []
    for room, flags in rooms.items():
        text = f"{room}: {', '.join(flags)}"
        lines += textwrap.wrap(
            text, width, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    return lines
