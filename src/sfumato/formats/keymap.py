"""Key maps: one table of rules per network, read in both directions; a key without a rule is an error."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import UserError

Op = Literal["", "swap", "transpose", "squeeze"]
HOLES = {"{n}": r"(\d+)", "{*}": r"(.+)"}
HOLE = re.compile(r"\{n\}|\{\*\}")
TAIL = r"(?P<tail>|\.weight|\.bias)"  # a rule that names a module covers the module's parameters


@dataclass(frozen=True)
class Rule:
    """One pattern ({n}: a number, {*}: any path). Several names in `ours` are stacked along rows in the original.

    `op` turns the original into ours: "swap" exchanges the halves of the rows, "transpose" a matrix,
    "squeeze" drops the two 1x1 kernel dimensions of a convolution that is a linear layer here.
    """

    original: str
    ours: tuple[str, ...]
    op: Op = ""


@dataclass(frozen=True)
class Place:
    """Where one of our names lies in the original layout: the index-th of `siblings` stacked along rows."""

    original: str
    index: int
    siblings: tuple[str, ...]
    op: Op


class KeyMap:
    """A table of rules, read both ways. `drop` matches original keys that have no counterpart on purpose."""

    def __init__(self, rules: Sequence[Rule], drop: Sequence[str] = ()) -> None:
        self.rules = tuple(rules)
        self._from_original = _Table([(rule.original, rule, 0) for rule in rules])
        self._from_ours = _Table([(name, rule, i) for rule in rules for i, name in enumerate(rule.ours)])
        self._drop = [pattern(text) for text in drop]

    def drops(self, original: str) -> bool:
        """Whether the key is known to have no counterpart here (a position table, a training buffer)."""
        return any(regex.fullmatch(original) for regex in self._drop)

    def locate(self, ours: str) -> Place:
        """Raises UserError when no rule covers the name."""
        hit = self._from_ours.find(ours)
        if hit is None:
            raise UserError(f"no rule of the key map covers {ours!r}")
        siblings = tuple(hit.fill(name) for name in hit.rule.ours)
        return Place(original=hit.fill(hit.rule.original), index=hit.index, siblings=siblings, op=hit.rule.op)

    def ours(self, original: str) -> tuple[tuple[str, ...], Op] | None:
        """Our names behind an original key, in row order, and the operation between; None when no rule covers it."""
        hit = self._from_original.find(original)
        return (tuple(hit.fill(name) for name in hit.rule.ours), hit.rule.op) if hit else None

    def split(self, original: str, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Our entries inside one original tensor; rows are views, so nothing is copied but a swap or transpose."""
        found = self.ours(original)
        if found is None:
            raise UserError(f"no rule of the key map covers {original!r}")
        names, op = found
        tensor = _apply(op, tensor)
        rows = [shapes[name][0] if shapes[name] else 1 for name in names]
        if len(names) > 1 and sum(rows) != tensor.shape[0]:
            raise UserError(f"{original!r} has {tensor.shape[0]} rows where {' + '.join(map(str, rows))} are expected")
        pieces = tensor.split(rows) if len(names) > 1 else (tensor,)
        yield from zip(names, pieces, strict=True)

    def to_ours(self, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """A whole state dict in our names; raises UserError for keys that no rule covers, all named at once."""
        unknown = [key for key in state if self.ours(key) is None and not self.drops(key)]
        if unknown:
            raise UserError(f"no rule of the key map covers {_some(unknown)}")
        kept = (key for key in state if not self.drops(key))
        return {name: piece for key in kept for name, piece in self.split(key, state[key], shapes)}

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole state dict in original names; raises UserError where one of several stacked tensors is missing."""
        originals = dict.fromkeys(self.locate(name).original for name in state)
        return {original: self.build(original, state) for original in originals}

    def build(self, original: str, state: Mapping[str, Tensor]) -> Tensor:
        """One original tensor out of ours; raises UserError where one of several stacked tensors is missing."""
        found = self.ours(original)
        if found is None:
            raise UserError(f"no rule of the key map covers {original!r}")
        names, op = found
        pieces = {i: state[name] for i, name in enumerate(names) if name in state}
        return _join(Place(original, 0, names, op), pieces)


def identity(prefix: str = "", drop: Sequence[str] = ()) -> KeyMap:
    """The map of a network whose names differ from the original by a prefix at most."""
    return KeyMap([Rule(prefix + "{*}", ("{*}",))], drop)


@dataclass(frozen=True)
class _Hit:
    """A rule that matched a name: what the holes held and which parameter of the module was meant."""

    rule: Rule
    index: int
    holes: tuple[str, ...]
    tail: str

    def fill(self, text: str) -> str:
        pieces = HOLE.split(text)
        return "".join(piece + hole for piece, hole in zip(pieces, (*self.holes, ""), strict=True)) + self.tail


class _Table:
    """Patterns with the rules they stand in; the first that matches wins. Answers are kept: names repeat a lot."""

    def __init__(self, rows: Sequence[tuple[str, Rule, int]]) -> None:
        self._rows: dict[str, list[tuple[re.Pattern[str], Rule, int]]] = defaultdict(list)
        for text, rule, index in rows:
            self._rows[_head(text)].append((_with_tail(text), rule, index))
        self._known: dict[str, _Hit | None] = {}

    def find(self, name: str) -> _Hit | None:
        if name not in self._known:
            self._known[name] = self._search(name)
        return self._known[name]

    def _search(self, name: str) -> _Hit | None:
        for head in (name.partition(".")[0], ""):  # rules are filed under their first path component
            for regex, rule, index in self._rows.get(head, ()):
                match = regex.fullmatch(name)
                if match:
                    tail = match.groupdict().get("tail")
                    holes = match.groups() if tail is None else match.groups()[:-1]
                    return _Hit(rule, index, holes, tail or "")
        return None


def pattern(text: str) -> re.Pattern[str]:
    """A pattern with {n} and {*} as a regular expression over whole names."""
    body = re.escape(text)
    for hole, meaning in HOLES.items():
        body = body.replace(re.escape(hole), meaning)
    return re.compile(body)


def matches(alternatives: str, name: str) -> bool:
    """Whether a whole name fits one of the patterns of a|b."""
    return any(each.fullmatch(name) for each in compiled(alternatives))


@cache
def compiled(alternatives: str) -> tuple[re.Pattern[str], ...]:
    return tuple(pattern(each) for each in alternatives.split("|")) if alternatives else ()


def _head(text: str) -> str:
    first = text.partition(".")[0]
    return "" if "{" in first else first


def _with_tail(text: str) -> re.Pattern[str]:
    return pattern(text) if text.endswith("{*}") else re.compile(pattern(text).pattern + TAIL)


def _apply(op: Op, tensor: Tensor) -> Tensor:
    if op == "swap":
        first, second = tensor.chunk(2)
        return torch.cat([second, first])
    if op == "transpose":
        return tensor.T.contiguous()
    if op == "squeeze":
        return tensor.reshape(tensor.shape[:2]) if tensor.ndim == 4 else tensor
    return tensor


def _undo(op: Op, tensor: Tensor) -> Tensor:
    if op == "squeeze":
        return tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return _apply(op, tensor)  # swap and transpose undo themselves


def _join(place: Place, pieces: Mapping[int, Tensor]) -> Tensor:
    missing = [name for i, name in enumerate(place.siblings) if i not in pieces]
    if missing:
        raise UserError(f"{place.original!r} needs {_some(missing)} too")
    ordered = [pieces[i] for i in range(len(pieces))]
    return _undo(place.op, torch.cat(ordered) if len(ordered) > 1 else ordered[0])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
