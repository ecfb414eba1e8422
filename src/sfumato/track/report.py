"""report.html: one page that tells a run, written while it runs and made again from its files at any time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfumato.common import files
from sfumato.errors import UserError
from sfumato.formats.metadata import without_paths
from sfumato.track.report_curves import Curves
from sfumato.track.report_facts import EMPTY, ENDING, Remembered, forget, read_description, write_description
from sfumato.track.report_page import page
from sfumato.track.report_samples import Thumbnails

log = logging.getLogger(__name__)
SECONDS = 30.0  # between two writings, unless something was saved or drawn
SHARE, SHARE_AT_SAVES = 0.01, 0.05  # of the time that writing may take


class Report:
    """Writes NAME.report.html, and what it needs beside the journal file into NAME.report.json."""

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        *,
        start: int,
        warnings: Remembered,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.clock, self.warnings = folder, clock, warnings
        self.name = str(description["name"])
        before = earlier(folder, self.name) if start else {}
        self.description = dict(description)
        self.earlier_warnings: list[dict[str, Any]] = before.get("warnings", [])
        now = time.time()
        self.session: dict[str, Any] = {
            "started": now, "updated": now, "start": start, "step": start, "seconds_per_step": 0.0, "state": "running",
        }  # fmt: skip
        kept = [each for each in before.get("sessions", []) if each["start"] < start]
        self.description["sessions"] = [*kept, self.session]
        self.curves, self.thumbnails = Curves(folder / f"{self.name}.run.jsonl"), Thumbnails()
        self.written, self.cost = -1e9, 0.0
        self.broken = False
        warnings.step = start

    def advance(self, step: int, seconds_per_step: float) -> None:
        """After a step was written into the journal file; writes the page where it is time to."""
        self.session["step"], self.session["seconds_per_step"] = step, seconds_per_step
        self.warnings.step = step
        if self.clock() - self.written >= max(SECONDS, self.cost / SHARE):
            self.write()

    def publish(self) -> None:
        """Something was saved or drawn."""
        if self.clock() - self.written >= self.cost / SHARE_AT_SAVES:
            self.write()

    def close(self, error: BaseException | None, *, total: int) -> None:
        """The last word: finished, stopped in good order, or why not."""
        forget(self.warnings)
        if error is None:
            self.session["state"] = "finished" if self.session["step"] >= total else "stopped"
        elif isinstance(error, KeyboardInterrupt):
            self.session["state"] = "stopped"
        else:
            self.session["state"] = "failed"
            self.session["error"] = without_paths(f"{error}" if isinstance(error, UserError) else repr(error))
        self.write()

    def write(self) -> None:
        """Both files; where that fails, once a warning and never again."""
        if self.broken:
            return
        began = self.clock()
        self.session["updated"] = time.time()
        self.description["warnings"] = [*self.earlier_warnings, *self.warnings.told()]
        try:
            write_description(self.folder / f"{self.name}{ENDING}", self.description)
            write_page(self.folder, self.description, self.curves, self.thumbnails)
        except OSError as error:
            self.broken = True
            log.warning("the report cannot be written any more: %s", error)
        self.written = self.clock()
        self.cost = self.written - began


def earlier(folder: Path, name: str) -> dict[str, Any]:
    """The description of the run that is resumed; {} where there is none that can be read."""
    path = folder / f"{name}{ENDING}"
    try:
        return read_description(path) if path.is_file() else {}
    except UserError:
        return {}


def write_page(folder: Path, description: Mapping[str, Any], curves: Curves, thumbnails: Thumbnails) -> Path:
    curves.read()
    sessions, name = description["sessions"], description["name"]
    whole = sessions and sessions[0]["start"] == 0  # else the beginning of the run was not told of
    since = time.strftime("%Y%m%d%H%M%S", time.localtime(sessions[0]["started"])) if whole else ""
    grid = thumbnails.grid(
        folder / "sample",
        name,
        steps_per_epoch=description["steps_per_epoch"],
        last=sessions[-1]["step"] if sessions else curves.last,
        since=since,
    )
    path = folder / f"{name}.report.html"
    files.write_text(path, page(description, curves, grid))
    return path


def remake(folder: Path, name: str | None) -> Path:
    """The page anew from the files of a run; gives its path. UserError where there is no such run, or several."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    names = sorted({path.name.removesuffix(end) for end in (ENDING, ".run.jsonl") for path in folder.glob(f"*{end}")})
    if not names:
        raise UserError(f"{folder} holds no run", fix="give the --output_dir of a run")
    if name is None and len(names) > 1:
        raise UserError(f"{folder} holds several runs", fix=f"--name with one of {', '.join(names)}")
    chosen = name or names[0]
    if chosen not in names:
        raise UserError(f"{folder} holds no run {chosen!r}", fix=f"there is {', '.join(names)}")
    path = folder / f"{chosen}{ENDING}"  # not there after a run with --no_report; its curves are
    description = read_description(path) if path.is_file() else {**EMPTY, "name": chosen}
    return write_page(folder, description, Curves(folder / f"{chosen}.run.jsonl"), Thumbnails())
