"""What the stages that find the data report: problems, notes, and which images are bad or skipped."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from sfumato.errors import Problems


@dataclass
class Findings:
    """Problems to fix, and lines for the report before the first step."""

    problems: Problems
    strict: bool
    notes: list[str]
    bad_images: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # subset -> faults
    skipped_names: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # subset -> image names

    def note(self, line: str) -> None:
        self.notes.append(line)

    def report_no_effect(self, line: str) -> None:
        """Report an option that has no effect; with --strict it is a problem."""
        if self.strict:
            self.problems.add(line, code="data-option-without-effect", fix="remove it")
        else:
            self.notes.append(line)
