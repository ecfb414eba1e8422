"""Tables of things by name, with a hint where a name is wrong."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from sfumato.errors import UserError

T = TypeVar("T")


def find_nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that a user most likely meant, or None when nothing is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


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

    def register(self, *names: str) -> Callable[[T], T]:
        def keep(thing: T) -> T:
            for name in names:
                assert name.lower() not in self._things, f"{self.noun} {name} is registered twice"
                self._things[name.lower()] = thing
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
