"""The options of one command: its own themes, and with them the vocabulary of training where it takes that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sfumato.common.text import EMPTY
from sfumato.config.base import Option, Options
from sfumato.config.command_line import read_command_line
from sfumato.config.option_source import OptionSource, check_values, refuse_absent
from sfumato.config.option_table import OptionTable, make_option_table, merge_tables
from sfumato.config.schema import training_table
from sfumato.errors import Problems

NO_DRY_RUN = {"dry_run": "it belongs to the commands that train"}  # option that other commands lack -> why
NO_TRIALS = {"plan": "it belongs to the commands that train and that fill caches", **NO_DRY_RUN}
Theme = TypeVar("Theme", bound=Options)


@dataclass(kw_only=True)
class CommandLine:
    """A command line that was read. Its faults are raised by `raise_faults` or with those of the whole config.

    source, values: the options of the vocabulary, as texts and in their types. own: those of the command's themes.
    """

    source: OptionSource
    values: dict[str, Any]
    own: Mapping[str, Any]
    absent: Mapping[str, str]
    problems: Problems

    def options(self, theme: type[Theme]) -> Theme:
        """One of the command's own themes; options at fault have their defaults."""
        return theme.model_construct(**{name: value for name, value in self.own.items() if name in theme.model_fields})

    def set_option(self, name: str, value: Any, *, place: str) -> None:
        """Set an option of the vocabulary that follows from one of the command's own, unless it is given itself."""
        if name in self.values:
            self.source.notes.append(f"{place} is ignored: --{name} takes precedence")
        else:
            self.source.values[name] = self.values[name] = value
            self.source.places[name] = place

    def raise_faults(self) -> None:
        self.problems.raise_all()


def read_command(
    argv: Sequence[str],
    *themes: type[Options],
    training: bool = True,
    aliases: Mapping[str, str] = EMPTY,
    absent: Mapping[str, str] = EMPTY,
) -> CommandLine:
    """Read the command line of a command with options of its own.

    training: whether it takes the vocabulary of training, too; an option that both have is the command's.
    aliases: other spellings of options. absent: options that it does not have, each with the reason.
    """
    own = make_option_table({theme.__name__: theme for theme in themes}, aliases=aliases)
    table = merge_tables(own, training_table()) if training else own
    problems = Problems()
    source = read_command_line(argv, problems, table, absent, is_lenient=training)
    refuse_absent(source, absent, problems)
    values = check_values(source, problems)
    report_missing(own, source, problems)
    own_values: dict[str, Any] = {}
    for name in (*own.options, *own.positionals):
        source.values.pop(name, None)
        if name in values:
            own_values[name] = values.pop(name)
    return CommandLine(source=source, values=values, own=own_values, absent=absent, problems=problems)


def report_missing(own: OptionTable, source: OptionSource, problems: Problems) -> None:
    """Add a problem for every required option that is not given."""
    for option in own.positionals.values():
        if is_missing(option, source):
            problems.add(f"{option.flag} is missing", code="argument-missing", fix=f"it is {option.help}")
    for option in own.options.values():
        if is_missing(option, source):
            problems.add(
                f"{option.flag} is missing", code="option-missing", fix=f"write {option.flag} {option.metavar}"
            )


def is_missing(option: Option, source: OptionSource) -> bool:
    return option.facts.required and option.name not in source.values and option.name not in source.suspects


def read_options(argv: Sequence[str], theme: type[Theme], *, aliases: Mapping[str, str] = EMPTY) -> Theme:
    """The options of a command that takes one theme of its own and nothing else. Raises all faults together."""
    line = read_command(argv, theme, training=False, aliases=aliases)
    line.raise_faults()
    return line.options(theme)
