"""An editor's state: images, captions, their faults, and the history of changes. Every method is one thing a page asks.

Answers are plain data for JSON. Whatever changes gets the next revision number, so that a page asks only for what it
has not seen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from sfumato.errors import UserError
from sfumato.tools.editor.caption_files import CaptionContent, CaptionStore, ChangedOnDiskError, encode_caption
from sfumato.tools.editor.faults import CAPTION_FAULTS, find_caption_faults, find_duplicates
from sfumato.tools.editor.history import EditHistory, EditStep, FileChange
from sfumato.tools.editor.sources import EditedDataset
from sfumato.tools.editor.text_changes import TextChange
from sfumato.tools.editor.token_counts import TokenCounter

WRITE_THREADS = 8  # threads: slow disks, above all those of a network, take several files at once
MAX_SAMPLES = 40  # captions that a preview shows
MAX_STEPS_SHOWN = 200
LOOK_SECONDS = 0.7  # between looks at the files on disk


@dataclass(kw_only=True)
class EditOutcome:
    """Of the files of one action: which were written, which are other ones meanwhile, and which cannot be written."""

    changed: list[int] = field(default_factory=list[int])
    conflicts: list[int] = field(default_factory=list[int])
    failures: dict[int, str] = field(default_factory=dict[int, str])


class EditSession:
    def __init__(self, dataset: EditedDataset, tokens: TokenCounter) -> None:
        self.dataset, self.tokens = dataset, tokens
        paths = list(dict.fromkeys(image.caption for image in dataset.images))
        numbers = {path: number for number, path in enumerate(paths)}
        self.file_of = [numbers[image.caption] for image in dataset.images]
        self.rules = {numbers[image.caption]: image.rules for image in reversed(dataset.images)}
        self.files = CaptionStore(paths)
        self.history = EditHistory()
        self.image_faults = {number: image.fault for number, image in enumerate(dataset.images) if image.fault}
        self.revision = 1
        self._changed_at = [1] * len(paths)  # revision of each caption
        self._faults_changed_at = 1  # revision of the images' faults
        self._latest: list[tuple[Any, ...]] = [()] * len(paths)
        self._text_faults: list[list[str]] = [[] for _ in paths]
        self._encoded = [""] * len(paths)  # captions as they are encoded
        self._lock = threading.RLock()
        self._last_look = time.monotonic()
        self._update(range(len(paths)))

    def read_state(self) -> dict[str, Any]:
        """Everything that a page needs at its start."""
        with self._lock:
            return {
                "title": self.dataset.title,
                "separator": self.rules[0].tag_separator,
                "notes": list(self.dataset.notes),
                "faults": dict(CAPTION_FAULTS),
                "images": [
                    {"name": image.name, "width": image.width, "height": image.height, "version": image.version,
                     "file": self.file_of[number]}
                    for number, image in enumerate(self.dataset.images)
                ],
                **self.list_changes(0),
            }  # fmt: skip

    def list_changes(self, since: int) -> dict[str, Any]:
        """What is new after a revision; looks at the files on disk, too."""
        with self._lock:
            if time.monotonic() - self._last_look > LOOK_SECONDS:
                if changed := self.files.refresh():
                    self._update(changed)
                self._last_look = time.monotonic()
            numbers = [number for number, revision in enumerate(self._changed_at) if revision > since]
            return {
                "revision": self.revision,
                "files": [self._describe_file(number) for number in numbers],
                "image_faults": self.image_faults if self._faults_changed_at > since else None,
                "tokenizers": [{"name": name, "limit": limit} for name, (_, limit) in self.tokens.tokenizers.items()],
                "counting": self.tokens.pending if self.tokens.is_loaded else -1,
                "token_fault": self.tokens.fault,
                "done": [describe_step(step) for step in self.history.past[-MAX_STEPS_SHOWN:]],
                "undone": [describe_step(step) for step in reversed(self.history.future[-MAX_STEPS_SHOWN:])],
            }

    def edit(self, number: int, text: str, *, base: str) -> dict[str, Any]:
        """Give one caption another text. base: the text that the page showed; a conflict where it is another one."""
        with self._lock:
            self._check_numbers([number])
            if self.files.reread(number):
                self._update([number])
            if self.files.contents[number].text != base:
                return self._describe_outcome(EditOutcome(conflicts=[number]))
            return self._change({number: text}, f"edit {self.files.paths[number].stem}")

    def change_many(self, numbers: Sequence[int], change: TextChange) -> dict[str, Any]:
        with self._lock:
            self._check_numbers(numbers)
            return self._change(self._find_new_texts(numbers, change), change.make_label())

    def preview(self, numbers: Sequence[int], change: TextChange) -> dict[str, Any]:
        """How many captions would change, and how the first ones would."""
        with self._lock:
            self._check_numbers(numbers)
            texts = self._find_new_texts(numbers, change)
            samples = [
                {"file": number, "before": self.files.contents[number].text, "after": texts[number]}
                for number in list(texts)[:MAX_SAMPLES]
            ]
            return {"count": len(texts), "samples": samples, "label": change.make_label()}

    def undo(self, steps: int = 1) -> dict[str, Any]:
        return self._move(steps, self.history.past, self.history.future, FileChange.invert)

    def redo(self, steps: int = 1) -> dict[str, Any]:
        return self._move(steps, self.history.future, self.history.past, lambda change: change)

    def count_tokens(self, number: int, text: str) -> dict[str, Any]:
        """Of a text that is being written: its tokens, and how many of its letters the encoders read."""
        self._check_numbers([number])
        rules = self.rules[number]
        counts = self.tokens.count(self.tokens.prepare(text, rules))
        return {"tokens": counts, "cut": self.tokens.find_cut(text, rules)}

    def add_image_fault(self, number: int, fault: str) -> None:
        with self._lock:
            self.revision += 1
            self.image_faults[number] = fault
            self._faults_changed_at = self.revision

    def update_tokens(self) -> None:
        """Take over what has been counted."""
        with self._lock:
            self._update(())

    def stop_writing(self) -> None:
        """Let the change that is being written end; none begins after it."""
        self._lock.acquire()

    def _check_numbers(self, numbers: Iterable[int]) -> None:
        if not all(0 <= number < len(self.files.paths) for number in numbers):
            raise ValueError("there is no such caption")

    def _find_new_texts(self, numbers: Sequence[int], change: TextChange) -> dict[int, str]:
        texts: dict[int, str] = {}
        for number in dict.fromkeys(numbers):
            before = self.files.contents[number].text
            if self.files.contents[number].problem:  # what is shown of it is a guess
                continue
            after = change.apply(before, self.rules[number].tag_separator).strip()
            if after != before:
                texts[number] = after
        return texts

    def _change(self, texts: Mapping[int, str], label: str) -> dict[str, Any]:
        changes: list[FileChange] = []
        for number, text in texts.items():
            content, data = self.files.contents[number], encode_caption(text)
            if text.strip() != content.text and not (content.data is None and not data):
                changes.append(FileChange(number, content.data, data))
        outcome = self._write(changes)
        if outcome.changed:
            self.history.add(EditStep(label=label, changes=tuple(changes)).keep_only(outcome.changed))
        return self._describe_outcome(outcome)

    def _move(
        self,
        steps: int,
        source: list[EditStep],
        target: list[EditStep],
        direct: Callable[[FileChange], FileChange],
    ) -> dict[str, Any]:
        """Undo steps or do them again. Files that others changed meanwhile keep their content."""
        total = EditOutcome()
        with self._lock:
            for _ in range(min(steps, len(source))):
                step = source.pop()
                outcome = self._write([direct(change) for change in step.changes])
                if outcome.changed:
                    target.append(step.keep_only(outcome.changed))
                if outcome.failures:
                    source.append(step.keep_only(list(outcome.failures)))
                total.changed += outcome.changed
                total.conflicts += outcome.conflicts
                total.failures |= outcome.failures
            return self._describe_outcome(total)

    def _write(self, changes: Sequence[FileChange]) -> EditOutcome:
        outcome = EditOutcome()

        def write(change: FileChange) -> None:
            number = change.number
            try:
                if self.files.contents[number].data != change.before:
                    raise ChangedOnDiskError
                self.files.write(number, change.after)
                outcome.changed.append(number)
            except ChangedOnDiskError:
                outcome.conflicts.append(number)
            except OSError as error:
                outcome.failures[number] = f"{self.files.paths[number]} cannot be written ({error.strerror})"
            except UserError as error:
                outcome.failures[number] = str(error)

        with ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="sfumato-captions") as pool:
            for _ in pool.map(write, changes):
                pass  # raises what a thread raised
        outcome.changed.sort()
        outcome.conflicts.sort()
        self._update([*outcome.changed, *outcome.conflicts])
        return outcome

    def _describe_outcome(self, outcome: EditOutcome) -> dict[str, Any]:
        return {
            "changed": outcome.changed,
            "conflicts": outcome.conflicts,
            "failures": [{"file": number, "message": text} for number, text in outcome.failures.items()],
        }

    def _update(self, numbers: Iterable[int]) -> None:
        """Find the faults and tokens of captions anew; those that look different get a new revision.

        numbers: of captions with another content. The faults that depend on others are found for all.
        """
        contents = self.files.contents
        for number in numbers:
            self._text_faults[number] = find_caption_faults(contents[number], self.rules[number])
            self._encoded[number] = self.tokens.prepare(contents[number].text, self.rules[number])
        duplicates = find_duplicates(contents)
        uncounted: list[str] = []
        revision = self.revision + 1
        for number, content in enumerate(contents):
            faults = [*self._text_faults[number], *(["duplicate"] if number in duplicates else [])]
            counts = None
            if content.data is not None:
                counts = self.tokens.get(self._encoded[number])
                if counts is None:
                    uncounted.append(self._encoded[number])
                elif self.tokens.exceeds(counts):
                    faults.append("long")
            shown = (content, tuple(faults), counts)
            if shown != self._latest[number]:
                self._latest[number] = shown
                self._changed_at[number] = self.revision = revision
        self.tokens.request(uncounted)

    def _describe_file(self, number: int) -> dict[str, Any]:
        content: CaptionContent
        content, faults, counts = self._latest[number]
        return {
            "id": number,
            "name": self.files.paths[number].name,
            "text": content.text,
            "exists": content.data is not None,
            "problem": content.problem,
            "faults": list(faults),
            "tokens": counts,
        }


def describe_step(step: EditStep) -> dict[str, Any]:
    return {"label": step.label, "count": len(step.changes)}
