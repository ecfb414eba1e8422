"""Where the stages that find the data tell what they noticed."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.errors import Problems


@dataclass
class Report:
    """Faults to mend, and lines for the report before the first step."""

    problems: Problems
    strict: bool
    notes: list[str]

    def note(self, line: str) -> None:
        self.notes.append(line)

    def no_effect(self, line: str) -> None:
        """Something given has no effect; with --strict that is a fault."""
        if self.strict:
            self.problems.add(line, fix="leave it out")
        else:
            self.notes.append(line)
