"""The checkpoints that a run has saved, found by their names in its folder, in the order of their steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.errors import UserError
from sfumato.formats.header import read_header
from sfumato.track.report_samples import select_evenly

FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")
STEP_KEY = "ss_steps"  # in a file's metadata


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A file or folder with what was trained up to a step."""

    path: Path
    step: int
    ema: str = ""  # the end of the name of an EMA's file

    @property
    def label(self) -> str:
        """Its heading on the page."""
        return f"step {self.step:,}" + (f", {self.ema.removeprefix('-')}" if self.ema else "")


def find_checkpoints(
    folder: Path, name: str, *, steps_per_epoch: int, last_step: int, best_step: int
) -> list[SavedCheckpoint]:
    """All of one run. UserError where there is none.

    last_step, best_step: of the run, and of its lowest validation loss, for files that do not say theirs.

    The copy of the best one is passed over where the run has saved its step anyway.
    """
    pattern = re.compile(rf"{re.escape(name)}(?:-step(\d+)|-(\d{{6,}})|-(best))?(-ema[\d.]*?)?")
    found: list[SavedCheckpoint] = []
    best: list[SavedCheckpoint] = []
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name if path.is_dir() else path.name.removesuffix(path.suffix))
        if match is None or not is_saved_model(path):
            continue
        step, epoch, is_best, ema = match.groups()
        by_name = int(step) if step else int(epoch) * steps_per_epoch if epoch else best_step if is_best else last_step
        number = by_name if step else read_step(path, by_name)
        (best if is_best else found).append(SavedCheckpoint(path=path, step=number, ema=ema or ""))
    steps = {checkpoint.step for checkpoint in found}
    found += [checkpoint for checkpoint in best if checkpoint.step not in steps]
    if not found:
        raise UserError(
            f"the run {name!r} has saved nothing in {folder}",
            code="compare-without-checkpoints",
            fix="train with --save_every_n_steps or --save_every_n_epochs",
        )
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.ema))


def is_saved_model(path: Path) -> bool:
    """A file of weights, or a folder with some."""
    if path.is_dir():
        return any(each.suffix in FILE_SUFFIXES for each in path.rglob("*"))
    return path.suffix in FILE_SUFFIXES


def read_step(path: Path, default: int) -> int:
    """The step that a file says it is of."""
    if path.suffix != ".safetensors" or path.is_dir():
        return default
    step = read_header(path).metadata.get(STEP_KEY, "")
    return int(step) if re.fullmatch(r"\d{1,15}", step) else default


def choose_some(checkpoints: Sequence[SavedCheckpoint], most: int) -> list[SavedCheckpoint]:
    """At most so many, evenly over the steps, the first and the last among them."""
    steps = sorted({checkpoint.step for checkpoint in checkpoints})
    for count in range(len(steps), 0, -1):
        kept = set(select_evenly(steps, count))
        chosen = [checkpoint for checkpoint in checkpoints if checkpoint.step in kept]
        if len(chosen) <= most:
            return chosen
    return list(checkpoints[-most:])
