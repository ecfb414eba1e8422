"""What a rule between options is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sfumato.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule. It is left out while one of its options is at fault for another reason.

    kind: "required" and "conflict" are errors; "no effect" is a line in the report, or an error with --strict;
    "note" is a line in the report.
    """

    name: str
    kind: Literal["required", "conflict", "no effect", "note"]
    options: tuple[str, ...]
    broken: Callable[[Config], bool]
    what: str
    fix: str
