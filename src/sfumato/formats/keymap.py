"""Key maps: one table of rules per network, between original keys and ours, those of diffusers and transformers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor

from sfumato.common.text import list_some, plural
from sfumato.errors import InternalError, UserError

Op = Literal["", "swap", "transpose", "squeeze"]
PLACEHOLDERS = {"{n}": r"(\d+)", "{*}": r"(.+)"}
PLACEHOLDER = re.compile(r"\{n\}|\{\*\}")
PARAMETER_SUFFIX = r"(?P<suffix>|\.weight|\.bias)"  # a rule that names a module covers the module's parameters


@dataclass(frozen=True)
class KeyRule:
    """One pattern ({n}: a number, {*}: any path). Several names in `ours` are stacked along rows in the original.

    `op` turns the original into ours: "swap" exchanges the halves of the rows, "transpose" a matrix,
    "squeeze" drops the two 1x1 kernel dimensions of a convolution that is a linear layer here.
    """

    original: str
    ours: tuple[str, ...]
    op: Op = ""


@dataclass(frozen=True)
class KeyLocation:
    """The original key of one of our names: the index-th of `siblings`, which are stacked along rows."""

    original: str
    index: int
    siblings: tuple[str, ...]
    op: Op


class KeyMap:
    """A table of rules, read in both directions.

    drop: patterns on original keys that every file has and that have no counterpart here. beside: on those of other
    networks, and of what training leaves behind, that some files have beside this network.
    """

    def __init__(self, rules: Sequence[KeyRule], drop: Sequence[str] = (), beside: Sequence[str] = ()) -> None:
        self.rules = tuple(rules)
        self._from_original = _RuleTable([(rule.original, rule, 0) for rule in rules])
        names: list[tuple[str, KeyRule, int]] = []
        for rule in rules:
            names += [(name, rule, i) for i, name in enumerate(rule.ours)]
        self._from_ours = _RuleTable(names)
        self._locations: dict[str, KeyLocation | None] = {}
        self._ours: dict[str, tuple[tuple[str, ...], Op] | None] = {}
        self._drop = [compile_pattern(text) for text in drop]
        self._beside = [compile_pattern(text) for text in beside]

    def is_dropped(self, original: str) -> bool:
        """Whether the key is known to have no counterpart here, since it is a position table or another network's."""
        return self.is_redundant(original) or any(regex.fullmatch(original) for regex in self._beside)

    def is_redundant(self, original: str) -> bool:
        """Whether the key is one of this network that is not needed: a position table, a copy, an unused layer."""
        return any(regex.fullmatch(original) for regex in self._drop)

    def find_original(self, ours: str) -> KeyLocation | None:
        """Where one of our names lies in the original layout; None where no rule covers it."""
        if ours not in self._locations:
            self._locations[ours] = self._locate(ours)
        return self._locations[ours]

    def _locate(self, ours: str) -> KeyLocation | None:
        match = self._from_ours.find(ours)
        if match is None:
            return None
        siblings = tuple(match.expand(name) for name in match.rule.ours)
        original = match.expand(match.rule.original)
        return KeyLocation(original=original, index=match.index, siblings=siblings, op=match.rule.op)

    def locate(self, ours: str) -> KeyLocation:
        """The same for a name that must have a rule: InternalError where it has none."""
        location = self.find_original(ours)
        if location is None:
            raise InternalError(f"no rule of the key map covers {ours!r}")
        return location

    def find_ours(self, original: str) -> tuple[tuple[str, ...], Op] | None:
        """Our names behind an original key, in row order, and the operation between; None where no rule covers it."""
        if original not in self._ours:
            match = self._from_original.find(original)
            names = tuple(match.expand(name) for name in match.rule.ours) if match else ()
            self._ours[original] = (names, match.rule.op) if match else None
        return self._ours[original]

    def split(self, original: str, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Our entries inside one original tensor; rows are views, so that only a swap or transpose copies.

        Raises UserError where the tensor has other rows than `shapes`, InternalError where no rule covers the key.
        """
        names, op = self._require_ours(original)
        tensor = _apply_op(op, tensor)
        rows = [shapes[name][0] if shapes[name] else 1 for name in names]
        if len(names) > 1 and sum(rows) != tensor.shape[0]:
            raise UserError(
                f"{original!r} has {plural(tensor.shape[0], 'row')} where {' + '.join(map(str, rows))} are expected",
                code="stacked-rows-mismatch",
            )
        pieces = tensor.split(rows) if len(names) > 1 else (tensor,)
        yield from zip(names, pieces, strict=True)

    def rename_shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        """Original key -> shape of a file that has our names, but for names that no rule covers."""
        renamed: dict[str, Sequence[int]] = {}
        for name, shape in shapes.items():
            location = self.find_original(name)
            renamed |= {location.original: shape} if location else {}
        return renamed

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in original names; InternalError where one of several stacked tensors is missing."""
        originals = dict.fromkeys(self.locate(name).original for name in state)
        return {original: self.build(original, state) for original in originals}

    def build(self, original: str, state: Mapping[str, Tensor]) -> Tensor:
        """One original tensor out of ours; InternalError where one of several stacked tensors is missing."""
        names, op = self._require_ours(original)
        missing = [name for name in names if name not in state]
        if missing:
            raise InternalError(f"{original!r} also needs {list_some(missing)}")
        pieces = [state[name] for name in names]
        return _undo_op(op, torch.cat(pieces) if len(pieces) > 1 else pieces[0])

    def _require_ours(self, original: str) -> tuple[tuple[str, ...], Op]:
        ours = self.find_ours(original)
        if ours is None:
            raise InternalError(f"no rule of the key map covers {original!r}")
        return ours


def make_identity_map(prefix: str = "", drop: Sequence[str] = ()) -> KeyMap:
    """The map of a network whose names are the original ones without a prefix."""
    return KeyMap([KeyRule(prefix + "{*}", ("{*}",))], drop)


@dataclass(frozen=True)
class _Match:
    """A rule that matches a name: the values of its placeholders and the parameter of the module that was meant."""

    rule: KeyRule
    index: int
    values: tuple[str, ...]
    suffix: str  # .weight, .bias or nothing

    def expand(self, text: str) -> str:
        """The pattern with the values in place of its placeholders."""
        pieces = PLACEHOLDER.split(text)
        return "".join(piece + value for piece, value in zip(pieces, (*self.values, ""), strict=True)) + self.suffix


class _RuleTable:
    """Patterns with their rules; the first that matches wins. Answers are cached, since names repeat a lot."""

    def __init__(self, rows: Sequence[tuple[str, KeyRule, int]]) -> None:
        self._rows: dict[str, list[tuple[re.Pattern[str], KeyRule, int]]] = defaultdict(list)
        for text, rule, index in rows:
            self._rows[_first_component(text)].append((_compile_rule(text), rule, index))
        self._cache: dict[str, _Match | None] = {}

    def find(self, name: str) -> _Match | None:
        if name not in self._cache:
            self._cache[name] = self._search(name)
        return self._cache[name]

    def _search(self, name: str) -> _Match | None:
        for first in (name.partition(".")[0], ""):  # rules are filed under their first path component
            for regex, rule, index in self._rows.get(first, ()):
                match = regex.fullmatch(name)
                if match:
                    suffix = match.groupdict().get("suffix")
                    values = match.groups() if suffix is None else match.groups()[:-1]
                    return _Match(rule, index, values, suffix or "")
        return None


@cache
def compile_pattern(text: str) -> re.Pattern[str]:
    """A pattern with {n} and {*} as a regular expression for whole names."""
    body = re.escape(text)
    for placeholder, expression in PLACEHOLDERS.items():
        body = body.replace(re.escape(placeholder), expression)
    return re.compile(body)


@lru_cache(maxsize=1 << 16)  # a run asks for each of its layers many times
def matches(alternatives: str, name: str) -> bool:
    """Whether a whole name fits one of the patterns of a|b."""
    return any(regex.fullmatch(name) for regex in compile_alternatives(alternatives))


@cache
def compile_alternatives(alternatives: str) -> tuple[re.Pattern[str], ...]:
    return tuple(compile_pattern(text) for text in alternatives.split("|")) if alternatives else ()


def _first_component(text: str) -> str:
    first = text.partition(".")[0]
    return "" if "{" in first else first


@cache
def _compile_rule(text: str) -> re.Pattern[str]:
    regex = compile_pattern(text)
    return regex if text.endswith("{*}") else re.compile(regex.pattern + PARAMETER_SUFFIX)


def _apply_op(op: Op, tensor: Tensor) -> Tensor:
    if op == "swap":
        first, second = tensor.chunk(2)
        return torch.cat([second, first])
    if op == "transpose":
        return tensor.T.contiguous()
    if op == "squeeze":
        return tensor.reshape(tensor.shape[:2]) if tensor.ndim == 4 else tensor
    return tensor


def _undo_op(op: Op, tensor: Tensor) -> Tensor:
    if op == "squeeze":
        return tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return _apply_op(op, tensor)  # swap and transpose undo themselves
