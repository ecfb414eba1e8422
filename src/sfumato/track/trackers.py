"""Curves on disk: one JSON object per step, and TensorBoard where it is asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sfumato import files
from sfumato.config import LogOptions
from sfumato.errors import UserError


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line per step, written at once; a resumed run takes back the lines of steps that it does again."""

    def __init__(self, path: Path, start: int) -> None:
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start] if start else []
        files.write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files for TensorBoard; a resumed run hides the events of the steps that it does again."""

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise UserError("TensorBoard is not installed", fix="pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, content: str) -> None:
        self.writer.add_text(name, content)

    def close(self) -> None:
        self.writer.close()


def make_trackers(
    options: LogOptions, output: Path, name: str, start: int, facts: Mapping[str, str]
) -> Sequence[Tracker]:
    """run.jsonl in the output folder always; TensorBoard under --logging_dir. `facts`: what --log_config writes."""
    trackers: list[Tracker] = [JsonLines(output / f"{name}.run.jsonl", start)]
    if options.log_with and options.logging_dir is None:
        raise UserError(f"--log_with {options.log_with} needs a folder", fix="--logging_dir FOLDER")
    if options.logging_dir is not None:
        stamp = (options.log_prefix or "") + time.strftime("%Y%m%d%H%M%S")
        board = TensorBoard(options.logging_dir / stamp / (options.log_tracker_name or "network_train"), start)
        if options.log_config:
            board.text("options", "\n".join(f"    {name} = {value}" for name, value in facts.items()))
        trackers.append(board)
    return trackers


def _lines(path: Path) -> list[str]:
    """Whole lines of an earlier run's file; a torn last one is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
