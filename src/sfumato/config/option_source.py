"""One source of option values (launcher, file or command line), checked alone so that faults name their place."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sfumato.common.foreign_keys import OTHER_SCRIPT
from sfumato.common.registry import did_you_mean, find_nearest
from sfumato.config.base import Option
from sfumato.config.loose_keys import REPEATED_ARGUMENT, LooseKey
from sfumato.config.option_table import OptionTable, group_options
from sfumato.config.schema import training_table
from sfumato.config.values import ARGUMENTS, list_repeated_names
from sfumato.errors import Problems

# pydantic's type of a refused value -> what is wrong with it; {} are the limits.
WRONG_TYPES = {
    "int_type": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "int_parsing_size": "has too many digits",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is not true or false",
    "bool_parsing": "is not true or false",
    "string_type": "is not text (put it in quotes)",
    "path_type": "is not a path (put it in quotes)",
    "dict_type": "is not a list of name=value",
}
OUT_OF_RANGE = {
    "greater_than_equal": "is below {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "is above {le:g}",
    "less_than": "must be below {lt:g}",
}
LONGEST_VALUE = 200  # letters of a value in a message
SCRIPT_NAME_OPTIONS = ("family", "method")  # what the name of a script says


@dataclass(kw_only=True)
class OptionSource:
    """Option values of one source.

    typed: False for the texts of a command line. places: option -> where it is written. loose: what only --strict
    refuses. suspects: options that are wrong, or missing only because of a fault that is reported already.
    """

    source: str
    typed: bool
    table: OptionTable = field(default_factory=training_table)
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    loose: list[LooseKey] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)

    def place(self, name: str) -> str:
        """Where an option is written, for a message."""
        return self.places.get(name, f"--{name}")


def check_values(source: OptionSource, problems: Problems) -> dict[str, Any]:
    """The values of a source in their types; each refused one becomes a problem and a suspect."""
    table = source.table
    given = [
        option for option in (*table.positionals.values(), *table.options.values()) if option.name in source.values
    ]
    checked: dict[str, Any] = {}
    for theme, options in group_options(given).items():
        names = {option.name for option in options}
        while names:
            values = {name: source.values[name] for name in names}
            try:
                model = table.themes[theme].model_validate(values, strict=None if source.typed else False)
            except ValidationError as error:
                wrong = report_wrong_values(error, source, problems)
                names -= wrong
                source.suspects |= wrong
            else:
                checked |= {name: getattr(model, name) for name in names}
                break
    note_repeated_arguments(source)
    return {name: value for name, value in checked.items() if fits_into_64_bits(name, value, source, problems)}


def note_repeated_arguments(source: OptionSource) -> None:
    """Arguments that are given twice become loose keys: the last counts."""
    for name, value in source.values.items():
        if source.table.find(name).metavar == ARGUMENTS:
            for repeated in list_repeated_names(value):
                key = LooseKey(reason=REPEATED_ARGUMENT, name=f"{name} {repeated}", place=source.place(name))
                source.loose.append(key)


def fits_into_64_bits(name: str, value: Any, source: OptionSource, problems: Problems) -> bool:
    """False for whole numbers beyond, which become problems; seeds have a limit of their own."""
    numbers = value if isinstance(value, tuple) else (value,)
    beyond = [number for number in numbers if type(number) is int and not -(2**63) <= number < 2**63]
    if not beyond or "seed" in name:
        return True
    source.suspects.add(name)
    what = f"{source.place(name)}: a number of {len(str(abs(beyond[0])))} digits does not fit into 64 bits"
    problems.add(what, code="option-beyond-64-bits")
    return False


def report_wrong_values(error: ValidationError, source: OptionSource, problems: Problems) -> set[str]:
    """Turn pydantic's findings into problems; gives the names of the options that were refused."""
    wrong: set[str] = set()
    for finding in error.errors():
        name = str(finding["loc"][0])
        wrong.add(name)
        report_wrong_value(source.place(name), source.table.find(name), finding, problems)
    return wrong


def report_wrong_value(place: str, option: Option, finding: ErrorDetails, problems: Problems) -> None:
    """One finding of pydantic as a problem; the value of a secret is not shown."""
    value = "its value" if option.secret else shorten(repr(finding["input"]))
    kind, limits = finding["type"], finding.get("ctx", {})
    if kind == "literal_error":
        choices = ", ".join(option.choices)
        problems.add(
            f"{place}: {value} is not one of {choices}",
            code="option-choice-unknown",
            fix=suggest_choice(finding["input"], option),
        )
    elif kind == "value_error":
        fault = limits["error"] if option.arity == "many" else f"{value} {limits['error']}"
        problems.add(f"{place}: {fault}", code="option-value-malformed")
    elif kind in OUT_OF_RANGE:
        fault = OUT_OF_RANGE[kind].format(**limits)
        problems.add(f"{place}: {value} {fault}", code="option-out-of-range")
    else:
        fault = WRONG_TYPES.get(kind, finding["msg"])
        problems.add(f"{place}: {value} {fault}", code="option-type-wrong")


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def suggest_choice(value: Any, option: Option) -> str:
    """The nearest choice, or nothing; all of them are listed before it."""
    hint = did_you_mean(str(value), option.choices)
    return hint if hint.startswith("did you mean") else ""


def report_unknown(place: str, name: str, source: OptionSource, problems: Problems, *, write: str) -> None:
    """Report a name that is no option, with the nearest ones. `write`: how an option is written here, e.g. "--{}"."""
    plain = name.replace("-", "_")
    options = source.table.options
    longer = list_longer_names(plain, source.table)
    if plain in options:
        source.suspects.add(plain)
        problems.add(f"{place} is not an option", code="option-misspelled", fix=f"write {write.format(plain)}")
    elif longer:
        source.suspects.update(longer)
        spelled = ", ".join(write.format(option) for option in longer[:6]) + (", ..." if len(longer) > 6 else "")
        problems.add(
            f"{place} is only the beginning of an option",
            code="option-abbreviated",
            fix=f"write {spelled}",
        )
    else:
        hint = find_nearest_option(plain, source.table)
        if hint:
            source.suspects.add(hint)
        problems.add(
            f"{place} is not an option",
            code="option-unknown",
            fix=f"did you mean {write.format(hint)}?" if hint else "",
        )


def list_longer_names(name: str, table: OptionTable, absent: Container[str] = ()) -> list[str]:
    """The options that a name is the beginning of, under any of their spellings, without those of other scripts."""
    spellings = [spelling for spelling in (*table.options, *table.aliases) if name and spelling.startswith(name)]
    longer = dict.fromkeys(table.aliases.get(spelling, spelling) for spelling in spellings)
    return [option for option in longer if option not in absent]


def find_nearest_option(name: str, table: OptionTable) -> str | None:
    """The option that a user most likely meant; None when nothing is near."""
    spelling = find_nearest(name, [*table.options, *table.aliases])
    return table.aliases.get(spelling, spelling) if spelling else None


def refuse_absent(source: OptionSource, absent: Mapping[str, str], problems: Problems) -> None:
    """Remove the options that this script does not have, with the reason that the script gives.

    One file may serve several scripts: there they are no fault, but for what contradicts the script's name.
    """
    for name in [name for name in source.values if name in absent]:
        del source.values[name]
        if source.typed and name not in SCRIPT_NAME_OPTIONS:
            source.loose.append(LooseKey(reason=OTHER_SCRIPT, name=name, place=source.place(name)))
            continue
        source.suspects.add(name)
        problems.add(f"{source.place(name)} is not an option here", code="option-of-another-script", fix=absent[name])
