"""Curves on disk: one JSON object per step, and TensorBoard where it is asked for."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sfumato import files
from sfumato.config import LogOptions
from sfumato.errors import UserError
from sfumato.formats.metadata import without_paths

log = logging.getLogger(__name__)
Value = float | Sequence[float]  # a list is for the journal file alone


class Tracker(Protocol):
    """Where a step's numbers go, by the names of the field's series: loss/average, lr/unet, ..."""

    def log(self, step: int, values: Mapping[str, Value]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line per step, written at once; a resumed run takes back the lines of steps that it does again.

    Numbers that JSON lacks (nan, inf) become null. A full disk costs lines, never the run.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path, self.torn, self.warned = path, False, False
        kept = [line for line in _lines(path) if _step(line) <= start] if start else []
        files.write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("ab", buffering=0)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self._write(json.dumps({"step": step, **row}))

    def close(self) -> None:
        self.file.close()

    def _write(self, line: str) -> None:
        """A torn line is ended by the next, so that it spoils none but itself."""
        content = (("\n" if self.torn else "") + line + "\n").encode()
        written, why = 0, "no room"
        try:
            written = self.file.write(content)
        except OSError as error:
            why = error.strerror or why
        if written < len(content) and not self.warned:
            log.warning("%s could not be written (%s); training goes on", self.path, why)
            self.warned = True
        if written:
            self.torn = written < len(content)


class TensorBoard:
    """Event files for TensorBoard; a resumed run hides the events of the steps that it does again."""

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise UserError("TensorBoard is not installed", fix="pip install tensorboard") from error
        try:
            self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None, flush_secs=30)
        except OSError as error:
            raise UserError(f"--logging_dir: cannot write into {folder} ({error.strerror})") from error

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def text(self, name: str, content: str) -> None:
        self.writer.add_text(name, content)

    def close(self) -> None:
        self.writer.close()


def make_trackers(
    options: LogOptions, output: Path, name: str, start: int, facts: Mapping[str, str]
) -> Sequence[Tracker]:
    """run.jsonl in the output folder always; TensorBoard under --logging_dir. `facts`: what --log_config writes.

    Facts must hold no secrets; absolute paths in them are cut down to names here.
    """
    if options.log_with and options.logging_dir is None:
        raise UserError(f"--log_with {options.log_with} needs a folder", fix="--logging_dir FOLDER")
    trackers: list[Tracker] = [JsonLines(output / f"{name}.run.jsonl", start)]
    if options.logging_dir is not None:
        board = TensorBoard(log_folder(options, options.logging_dir), start)
        if options.log_config:
            board.text("options", "\n".join(f"    {key} = {without_paths(value)}" for key, value in facts.items()))
        trackers.append(board)
    return trackers


def log_folder(options: LogOptions, root: Path) -> Path:
    """This run's folder: --log_prefix and the time, and in it the tracker's name, as the field lays them out."""
    stamp = (options.log_prefix or "") + time.strftime("%Y%m%d%H%M%S")
    return root / stamp / (options.log_tracker_name or "network_train")


def _lines(path: Path) -> list[str]:
    """Whole lines of an earlier run's file; a torn last one is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()


def _step(line: str) -> float:
    """The step that a line is about; infinity where it is torn."""
    try:
        row: Any = json.loads(line)
        return row["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
