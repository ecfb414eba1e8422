"""What was changed since the editor started, step by step: undone and done again, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class FileChange(NamedTuple):
    """The content of one file before and after; None: there was no file, or it is to go."""

    number: int
    before: bytes | None
    after: bytes | None

    def invert(self) -> FileChange:
        return FileChange(self.number, self.after, self.before)


@dataclass(frozen=True, kw_only=True)
class EditStep:
    """Changes that one action made."""

    label: str
    changes: tuple[FileChange, ...]

    def keep_only(self, numbers: Sequence[int]) -> EditStep:
        """The step without the changes of other files."""
        kept = set(numbers)
        return EditStep(label=self.label, changes=tuple(each for each in self.changes if each.number in kept))


@dataclass(kw_only=True)
class EditHistory:
    """past: oldest first. future: what was undone; what to do again next is last."""

    past: list[EditStep] = field(default_factory=list[EditStep])
    future: list[EditStep] = field(default_factory=list[EditStep])

    def add(self, step: EditStep) -> None:
        self.past.append(step)
        self.future.clear()
