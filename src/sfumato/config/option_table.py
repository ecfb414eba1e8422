"""The options that a command takes: themes by name, their options, and other spellings of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sfumato.common.text import EMPTY
from sfumato.config.base import Option, Options, make_option


@dataclass(frozen=True, kw_only=True)
class OptionTable:
    """What the reader of a command line or a file looks names up in."""

    themes: Mapping[str, type[Options]]
    options: Mapping[str, Option]  # by name
    positionals: Mapping[str, Option] = field(default_factory=dict)  # by name, in the order of the command line
    aliases: Mapping[str, str] = field(default_factory=dict)  # other spelling -> option

    def find(self, name: str) -> Option:
        """An option or a positional argument by its name."""
        return self.positionals[name] if name in self.positionals else self.options[name]


def make_option_table(themes: Mapping[str, type[Options]], *, aliases: Mapping[str, str] = EMPTY) -> OptionTable:
    """The options of some themes, theme after theme in the order of their fields."""
    named: dict[str, Option] = {}
    positionals: dict[str, Option] = {}
    for theme, options in themes.items():
        for name, info in options.model_fields.items():
            assert name not in named | positionals, f"two themes have the option {name}"
            option = make_option(name, theme, info)
            (positionals if option.facts.positional else named)[name] = option
    return OptionTable(themes=themes, options=named, positionals=positionals, aliases=aliases)


def merge_tables(first: OptionTable, second: OptionTable) -> OptionTable:
    """Both tables as one; where both have an option, that of `first` counts."""
    return OptionTable(
        themes={**first.themes, **second.themes},
        options={**first.options, **{name: o for name, o in second.options.items() if name not in first.options}},
        positionals={**first.positionals, **second.positionals},
        aliases={**second.aliases, **first.aliases},
    )


def group_options(options: Iterable[Option]) -> dict[str, list[Option]]:
    """Theme -> its options, in the order given."""
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(option.theme, []).append(option)
    return groups
