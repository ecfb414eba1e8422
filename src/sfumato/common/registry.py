"""Tables of things by name, with a hint where a name is wrong."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

from sfumato.errors import UserError

S = TypeVar("S")
T = TypeVar("T")
SHORT_NAME, LONG_NAME = 4, 8  # letters


def find_nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that a user most likely meant, or None when nothing is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def find_misspelled(name: str, choices: Iterable[str]) -> str | None:
    """The choice that differs from a name by a typing error alone; None where the name may well be another word.

    A typing error: other case or signs between the words, or one letter too many, too few, wrong or exchanged with its
    neighbor; two such in names of 8 letters and more, none in names of 3 and less.
    """
    plain, best = spell_plainly(name), None
    for choice in choices:
        other = spell_plainly(choice)
        shorter = min(len(plain), len(other))
        allowed = 2 if shorter >= LONG_NAME else int(shorter >= SHORT_NAME)
        if abs(len(plain) - len(other)) <= allowed:
            distance = count_edits(plain, other)
            if distance <= allowed and (best is None or distance < best[0]):
                best = (distance, choice)
    return best[1] if best else None


def spell_plainly(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def count_edits(first: str, second: str) -> int:
    """Letters to insert, remove, replace or exchange with a neighbor (optimal string alignment distance)."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        older, before, row = before, row, [i]
        for j, other in enumerate(second, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The hint that goes into an error's `fix`: the nearest spelling, else what is allowed."""
    choices = sorted(choices)
    guess = find_nearest(name, choices)
    return f"did you mean {guess!r}?" if guess else f"known: {', '.join(choices)}"


class Registry(Generic[T]):
    """A table of interchangeable things, found by case-insensitive name; `noun` says what they are."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._things: dict[str, T] = {}
        self._names: list[str] = []

    def register(self, *names: str) -> Callable[[S], S]:
        """A decorator; of a class it keeps the type, whatever T is."""

        def keep(thing: S) -> S:
            for name in names:
                assert name.lower() not in self._things, f"{self.noun} {name} is registered twice"
                self._things[name.lower()] = cast(T, thing)
                self._names.append(name)
            return thing

        return keep

    def get(self, name: str) -> T:
        """Raises UserError with the nearest known name."""
        if name.lower() not in self._things:
            raise UserError(f"unknown {self.noun} {name!r}", code="name-unknown", fix=did_you_mean(name, self._names))
        return self._things[name.lower()]

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._things

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)


def bind_arguments(function: Callable[..., Any], options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Check that `function` takes every given option by keyword; UserError names the first that it does not."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(options)
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]
    for name in options:
        if name not in known:
            raise UserError(f"{where} does not take {name!r}", code="argument-unknown", fix=did_you_mean(name, known))
    return dict(options)
