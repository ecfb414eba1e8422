"""Prompts that are typed, one after the other."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from sfumato.cli.exits import report_error
from sfumato.config.prompts import Prompt, parse_line
from sfumato.errors import UserError

GREETING = (
    "a prompt a line, its options behind it: a cat --n a dog --w 512 --d 1; Ctrl-D ends (Windows: Ctrl-Z, Enter)\n"
)
OPTION_NAME = re.compile(r"(?<=\s--)\w+")


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """How a command reads prompts from the terminal."""

    names: Mapping[str, str] = field(default_factory=dict)  # option of its lines -> ours
    carried: Sequence[str] = ()  # fields of a prompt that hold for those after it
    ends_at_empty_line: bool = False
    questions: Sequence[str] = ()  # fields that are asked for one by one, instead of lines with options

    def read(self) -> Iterator[list[Prompt]]:
        """A prompt at a time, until the end of the input."""
        carried: dict[str, Any] = {}
        if sys.stdin.isatty():
            sys.stderr.write(GREETING if not self.questions else "")
        while True:
            prompt = self._ask() if self.questions else self._read_line()
            if prompt is None:
                return
            if prompt.prompt or not self.questions:
                carried |= {name: value for name in self.carried if (value := vars(prompt)[name]) not in (None, ())}
                yield [prompt.apply_defaults(carried)]

    def _read_line(self) -> Prompt | None:
        """None at the end; lines without words, and those that are reported to be wrong, are skipped."""
        while True:
            line = read_answer("prompt")
            if line is None or (self.ends_at_empty_line and not line.strip()):
                return None
            if line.strip():
                renamed = OPTION_NAME.sub(lambda match: self.names.get(match[0], match[0]), line)
                try:
                    prompt = parse_line(renamed, where="the line")
                except UserError as error:
                    report_error(error)
                    continue
                return Prompt(**{**vars(prompt), "negative_prompt": ""}) if prompt.negative_prompt == "-" else prompt

    def _ask(self) -> Prompt | None:
        """An empty first answer ends."""
        answers = {name: read_answer(name) for name in self.questions[:1]}
        if not answers[self.questions[0]]:
            return None
        answers |= {name: read_answer(name) for name in self.questions[1:]}
        values: dict[str, Any] = {name: text for name, text in answers.items() if text}
        if values.get("seed", "").isdigit():
            values["seed"] = int(values["seed"])
        else:
            values.pop("seed", None)
        return Prompt(**values)


def read_answer(what: str) -> str | None:
    """A line without its end; None at the end of the input. On a terminal lines can be edited and called back."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has its own editing
            import_module("readline")
        try:
            return input(f"{what}: ")
        except EOFError:
            sys.stderr.write("\n")  # what comes next begins a line
            return None
    sys.stderr.write(f"{what}: ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None
