"""The type of a rule between options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sfumato.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class OptionRule:
    """One rule; skipped while one of its options is at fault for another reason.

    code: of the error, and the name under which a command disables the rule.
    severity: "required" and "conflict" are errors; "no effect" is a line in the report, or an error with --strict;
    "note" is a line in the report.
    """

    code: str
    severity: Literal["required", "conflict", "no effect", "note"]
    options: tuple[str, ...]
    is_broken: Callable[[Config], bool]
    what: str
    fix: str
