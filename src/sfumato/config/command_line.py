"""The command line: words to option names and texts; types come later, with those of the other sources."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sfumato.common.names import OPTION_ALIASES
from sfumato.config.layer import Layer, unknown
from sfumato.config.schema import vocabulary
from sfumato.errors import Problems


def read_command_line(argv: Sequence[str], problems: Problems) -> Layer:
    """`--name`, `--name value`, `--name=value`, `--name value value` for lists, `--no_name` for switches."""
    layer = Layer(source="command line", typed=False)
    words = list(argv)
    while words:
        word = words.pop(0)
        following = 0
        while following < len(words) and not is_option(words[following]):
            following += 1
        values, words = words[:following], words[following:]
        if is_option(word):
            take(word, values, layer, problems)
        else:
            stray([word, *values], "at the start", layer, problems)
    return layer


def is_option(word: str) -> bool:
    """Negative numbers are values, and so is a lone dash."""
    return re.match(r"--|-[A-Za-z]|[–—]", word) is not None


def take(word: str, values: list[str], layer: Layer, problems: Problems) -> None:
    """Store one option and the words that follow it."""
    flag, equals, attached = word.partition("=")
    written = re.sub(r"^[-–—]+", "", flag)
    name = OPTION_ALIASES.get(written, written)
    off = name not in vocabulary() and switched_off(name)
    name = name.removeprefix("no_") if off else name
    if name not in vocabulary() or not flag.startswith("--"):
        unknown(flag, written, layer, problems, write="--{}")
        return
    option = vocabulary()[name]
    if equals:
        values = [attached, *values]
    if option.kind == "flag":
        if values:
            switch_with_value(flag, name, layer, problems)
            return
        store(name, not off, flag, layer)
    elif option.kind == "many":
        store(name, tuple(values), flag, layer)
    elif not values:
        layer.suspects.add(name)
        problems.add(f"{flag} needs a value", fix=f"write {flag} {option.takes}")
    else:
        store(name, values[0], flag, layer)
        if values[1:]:
            stray(values[1:], f"after {flag}, which takes one value", layer, problems, secret=option.secret)


def switched_off(name: str) -> bool:
    """Whether this is the negation of a switch, as no_cache_latents."""
    bare = name.removeprefix("no_")
    return bare != name and bare in vocabulary() and vocabulary()[bare].kind == "flag"


def store(name: str, value: object, flag: str, layer: Layer) -> None:
    if name in layer.values:
        layer.notes.append(f"--{name} is given twice; the last one counts")
    layer.values[name] = value
    layer.places[name] = flag


def switch_with_value(flag: str, name: str, layer: Layer, problems: Problems) -> None:
    layer.suspects.add(name)
    problems.add(f"{flag} is a switch and takes no value", fix=f"write --{name}, or --no_{name} to switch it off")


def stray(words: list[str], where: str, layer: Layer, problems: Problems, *, secret: bool = False) -> None:
    shown = "words" if secret else " ".join(repr(word) for word in words)
    problems.add(f"unexpected {shown} {where}", fix="options begin with --, and a value with spaces needs quotes")
