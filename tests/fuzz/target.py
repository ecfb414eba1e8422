"""What is fuzzed: a target is a reader of foreign bytes with good inputs, registered under its function's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Read = Callable[[bytes], object]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A reader, ready to read.

    seeds: inputs that it accepts. read: raises UserError, or one of `documented`, where an input is refused.
    """

    seeds: Sequence[bytes]
    read: Read
    documented: tuple[type[Exception], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """prepare: from an empty folder, which is the reader's own, to its setup. share: of all inputs, relative."""

    name: str
    module: str
    prepare: Callable[[Path], Setup]
    tokens: Sequence[bytes]
    share: float


TARGETS: dict[str, Target] = {}


def target(*tokens: bytes, share: float = 1.0) -> Callable[[Callable[[Path], Setup]], Callable[[Path], Setup]]:
    """Registers a function that prepares a target. tokens: byte strings that mean something to its reader.

    share: below 1 for slow readers, which get fewer inputs.
    """

    def register(prepare: Callable[[Path], Setup]) -> Callable[[Path], Setup]:
        assert prepare.__name__ not in TARGETS
        name, module = prepare.__name__, prepare.__module__
        TARGETS[name] = Target(name=name, module=module, prepare=prepare, tokens=tokens, share=share)
        return prepare

    return register


def through_file(path: Path, read: Callable[[Path], object]) -> Read:
    """A reader of files as one of bytes: each input is written to `path` first."""

    def read_bytes(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return read_bytes
