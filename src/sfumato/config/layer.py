"""One source of option values (launcher, file or command line), checked on its own so that faults name their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from sfumato.common.names import FOREIGN_KEYS, OPTION_ALIASES
from sfumato.common.registry import did_you_mean, nearest
from sfumato.config.base import Option
from sfumato.config.schema import THEMES, by_theme, vocabulary
from sfumato.errors import Problems

# How a value that pydantic refuses is described; {} are the limits that it names.
WORDS = {
    "int_type": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is not true or false",
    "bool_parsing": "is not true or false",
    "string_type": "is not text (put it in quotes)",
    "path_type": "is not a path (put it in quotes)",
    "dict_type": "is not a list of name=value",
    "greater_than_equal": "is below {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "is above {le:g}",
    "less_than": "must be below {lt:g}",
}


@dataclass(kw_only=True)
class Layer:
    """Values from one source. `places` says where each was written; `typed` is False for texts of a command line."""

    source: str
    typed: bool
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)  # options that are wrong or missing because of a fault already told

    def place(self, name: str) -> str:
        return self.places.get(name, f"--{name}")


def check(layer: Layer, problems: Problems) -> dict[str, Any]:
    """The values of a layer in their right types; each refused one becomes a problem and a suspect."""
    known = vocabulary()
    checked: dict[str, Any] = {}
    for theme, options in by_theme(known[name] for name in layer.values).items():
        names = {each.name for each in options}
        while names:
            given = {name: layer.values[name] for name in names}
            try:
                model = THEMES[theme].model_validate(given, strict=None if layer.typed else False)
            except ValidationError as error:
                wrong = describe(error, layer, problems)
                names -= wrong
                layer.suspects |= wrong
            else:
                checked |= {name: getattr(model, name) for name in names}
                break
    return checked


def describe(error: ValidationError, layer: Layer, problems: Problems) -> set[str]:
    """Turn pydantic's findings into problems; gives the names of the options that were refused."""
    wrong: set[str] = set()
    for finding in error.errors():
        name = str(finding["loc"][0])
        wrong.add(name)
        option = vocabulary()[name]
        shown = "its value" if option.secret else repr(finding["input"])
        limits = finding.get("ctx", {})
        if finding["type"] == "literal_error":
            text, fix = f"{shown} is not one of {', '.join(option.choices)}", guess(finding["input"], option)
        elif finding["type"] == "value_error":
            text, fix = f"{'' if option.kind == 'many' else shown + ' '}{limits['error']}", ""
        else:
            text, fix = f"{shown} {WORDS.get(finding['type'], finding['msg']).format(**limits)}", ""
        problems.add(f"{layer.place(name)}: {text}", fix=fix)
    return wrong


def guess(value: Any, option: Option) -> str:
    hint = did_you_mean(str(value), option.choices)
    return hint if hint.startswith("did you mean") else ""


def unknown(place: str, name: str, layer: Layer, problems: Problems, *, write: str) -> None:
    """A name that is no option: say which was meant. `write` is how an option is written here, as "--{}"."""
    plain = name.replace("-", "_")
    longer = [each for each in vocabulary() if plain and each.startswith(plain)]
    if plain in vocabulary():
        layer.suspects.add(plain)
        problems.add(f"{place} is not an option", fix=f"write {write.format(plain)}")
    elif longer:
        layer.suspects.update(longer)
        shown = ", ".join(write.format(each) for each in longer[:6]) + (", ..." if len(longer) > 6 else "")
        problems.add(f"{place} is not an option, and names are not abbreviated", fix=f"write {shown}")
    else:
        hint = nearest_option(plain)
        if hint:
            layer.suspects.add(hint)
        problems.add(f"{place} is not an option", fix=f"did you mean {write.format(hint)}?" if hint else "")


def nearest_option(name: str) -> str | None:
    found = nearest(name, [*vocabulary(), *OPTION_ALIASES])
    return OPTION_ALIASES.get(found, found) if found else None


def refuse_absent(layer: Layer, absent: Mapping[str, str], problems: Problems) -> None:
    """Take out the options that this script does not have, with the reason that the script gives.

    Some of them front ends write into every configuration file; there they are no fault.
    """
    for name in [name for name in layer.values if name in absent]:
        del layer.values[name]
        if layer.typed and name in FOREIGN_KEYS:
            layer.notes.append(f"{layer.place(name)} is ignored: {FOREIGN_KEYS[name]}")
            continue
        layer.suspects.add(name)
        problems.add(f"{layer.place(name)} is not an option here", fix=absent[name])
