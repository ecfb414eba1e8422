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
    "note" is a line in the report. what: what is wrong; for "no effect" the options alone, and `reason` says why.
    """

    code: str
    severity: Literal["required", "conflict", "no effect", "note"]
    options: tuple[str, ...]
    is_broken: Callable[[Config], bool]
    what: str
    fix: str
    reason: str = ""

    @property
    def sentence(self) -> str:
        """What is wrong, as one sentence."""
        if not self.reason:
            return self.what
        verb = "have" if " and " in self.what or "options" in self.what else "has"
        colon = "" if self.reason.startswith(("with ", "without ")) else ":"
        return f"{self.what} {verb} no effect{colon} {self.reason}"
