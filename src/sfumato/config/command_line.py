"""The command line: words to option names and texts; types come later, with those of the other sources."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import NamedTuple

from sfumato.config.base import Option
from sfumato.config.file_values import is_zero_for_none
from sfumato.config.loose_keys import EMPTY_OPTION, SHORT_NAME, ZERO_OPTION, LooseKey
from sfumato.config.option_source import OptionSource, list_longer_names, report_unknown
from sfumato.config.option_table import OptionTable
from sfumato.config.schema import THEMES, training_table
from sfumato.errors import Problems

TEXTS = ("TEXT", "")  # placeholders of options for which an empty text is a value, and of switches


class BareWords(NamedTuple):
    """Words that no option takes: positional arguments, or a mistake."""

    words: Sequence[str]
    where: str  # for a message
    secret: bool = False  # they follow a secret, and may be one


def read_command_line(
    argv: Sequence[str],
    problems: Problems,
    table: OptionTable | None = None,
    absent: Container[str] = (),
    *,
    is_lenient: bool = True,
) -> OptionSource:
    """`--name`, `--name value`, `--name=value`, `--name value value` for lists, `--no_name` for switches.

    table: what is known; the options of training by default. absent: options that the script does not have.
    is_lenient: as for sd-scripts, a beginning that only one option has is its name; an empty path or number is none.
    """
    source = OptionSource(source="command line", typed=False, table=table or training_table())
    bare: list[BareWords] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        following = 0
        while following < len(words) and not is_option(words[following]):
            following += 1
        values, words = words[:following], words[following:]
        if is_option(word):
            bare.append(store_option(word, values, source, problems, absent if is_lenient else None))
        else:
            bare.append(BareWords([word, *values], "at the start"))
    store_positionals(bare, source, problems)
    return source


def is_option(word: str) -> bool:
    """Negative numbers are values, and so is a lone dash."""
    return re.match(r"--|-[A-Za-z]|[–—]", word) is not None


def store_option(
    word: str, values: list[str], source: OptionSource, problems: Problems, absent: Container[str] | None = None
) -> BareWords:
    """Store one option with the words that follow it; gives those that it does not take.

    absent: options of other scripts, which no beginning means; None where names are whole and values are not empty.
    """
    flag, equals, attached = word.partition("=")
    written = re.sub(r"^[-–—]+", "", flag)
    options = source.table.options
    name = source.table.aliases.get(written, written)
    off = name not in options and is_negation(name, source.table)
    name = name.removeprefix("no_") if off else complete_name(name, flag, source, absent)
    surplus = BareWords([], "")
    if name not in options or not flag.startswith("--"):
        report_unknown(flag, written, source, problems, write="--{}")
        return surplus
    option = options[name]
    if equals:
        values = [attached, *values]
    if option.arity == "flag":
        if values and (equals or not source.table.positionals):
            report_switch_value(flag, name, source, problems)
            return surplus
        store_value(name, not off, flag, source)
        surplus = BareWords(values, f"after {flag}, which takes no value")
    elif absent is not None and (reason := say_not_given(option, values)):
        source.loose.append(LooseKey(reason=reason, name=f"--{name}", place=flag))
    elif option.arity == "many" and option.facts.repeatable:
        store_value(name, (*source.values.pop(name, ()), *values), flag, source)
    elif option.arity == "many":
        store_value(name, tuple(values), flag, source)
    elif not values:
        source.suspects.add(name)
        problems.add(f"{flag} needs a value", code="option-value-missing", fix=f"write {flag} {option.metavar}")
    else:
        store_value(name, values[0], flag, source)
        surplus = BareWords(values[1:], f"after {flag}, which takes one value", option.secret)
    return surplus


def say_not_given(option: Option, values: Sequence[str]) -> str:
    """Why the words after an option are no value: empty, or a 0 outside its limits; "" where they are one."""
    if values and not any(values) and option.metavar not in TEXTS:
        return EMPTY_OPTION
    is_zero = option.theme in THEMES and option.arity == "one" and values and is_zero_for_none(option, values[0])
    return ZERO_OPTION if is_zero else ""


def complete_name(name: str, flag: str, source: OptionSource, absent: Container[str] | None) -> str:
    """The one option that a name is the beginning of, which becomes a loose key; else the name itself."""
    longer = [] if absent is None else list_longer_names(name, source.table, absent)
    if name in source.table.options or len(longer) != 1 or not flag.startswith("--"):
        return name
    source.loose.append(LooseKey(reason=SHORT_NAME, name=f"{flag} is --{longer[0]}", place=flag))
    return longer[0]


def is_negation(name: str, table: OptionTable) -> bool:
    """Whether this switches an option off, e.g. no_cache_latents."""
    option = table.options.get(name.removeprefix("no_"))
    return name.startswith("no_") and option is not None and option.arity == "flag"


def store_value(name: str, value: object, flag: str, source: OptionSource) -> None:
    """Store a value and where it stands; of several the last one counts."""
    if name in source.values:
        source.notes.append(f"--{name} is given twice; the last one counts")
    source.values[name] = value
    source.places[name] = flag


def report_switch_value(flag: str, name: str, source: OptionSource, problems: Problems) -> None:
    source.suspects.add(name)
    problems.add(
        f"{flag} is a switch and takes no value",
        code="switch-with-value",
        fix=f"write --{name}, or --no_{name} to switch it off",
    )


def store_positionals(bare: Sequence[BareWords], source: OptionSource, problems: Problems) -> None:
    """Give the words that no option takes to the positional arguments in turn; the rest are problems."""
    waiting = list(source.table.positionals.values())
    for words, where, secret in bare:
        rest = list(words)
        while rest and waiting and not secret:
            option = waiting[0]
            if option.arity == "many":  # takes everything that is left, also after further options
                source.values[option.name] = (*source.values.get(option.name, ()), *rest)
                rest = []
            else:
                source.values[option.name] = rest.pop(0)
                waiting.pop(0)
            source.places[option.name] = option.flag
        if rest:
            report_stray_words(BareWords(rest, where, secret), problems)


def report_stray_words(bare: BareWords, problems: Problems) -> None:
    words = "words" if bare.secret else " ".join(repr(word) for word in bare.words)
    problems.add(
        f"unexpected {words} {bare.where}",
        code="words-unexpected",
        fix="options begin with --, and a value with spaces needs quotes",
    )
