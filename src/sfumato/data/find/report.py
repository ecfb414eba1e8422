"""Where the stages that find the data tell what they noticed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from sfumato.errors import Problems


@dataclass
class Report:
    """Faults to mend, and lines for the report before the first step."""

    problems: Problems
    strict: bool
    notes: list[str]
    bad_images: defaultdict[str, list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )  # by subset: what is wrong
    left_out: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # by subset: pictures' names

    def note(self, line: str) -> None:
        self.notes.append(line)

    def no_effect(self, line: str) -> None:
        """Something given has no effect; with --strict that is a fault."""
        if self.strict:
            self.problems.add(line, fix="leave it out")
        else:
            self.notes.append(line)
