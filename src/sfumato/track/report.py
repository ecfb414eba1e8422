"""NAME.report.html: one page about a run, updated while it runs; it can be rebuilt from the run's files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfumato.common import files
from sfumato.common.text import strip_paths
from sfumato.config.secrets import collect_machine_secrets, redact
from sfumato.errors import UserError
from sfumato.track.image_watch import ImageWatch
from sfumato.track.progress import Speed
from sfumato.track.report_curves import METRICS_SUFFIX, Curves
from sfumato.track.report_facts import (
    DESCRIPTION_SUFFIX,
    EMPTY_DESCRIPTION,
    WarningCollector,
    read_description,
    stop_collecting,
    write_description,
)
from sfumato.track.report_page import render_page
from sfumato.track.report_samples import Thumbnails

UPDATE_SECONDS = 30.0  # between two updates, unless something was saved or sampled
MAX_SHARE, MAX_SHARE_AT_SAVES = 0.01, 0.05  # of the run's time that writing may take


class Report:
    """Writes NAME.report.html, and NAME.report.json with what it shows besides the metrics file."""

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        *,
        start: int,
        warnings: WarningCollector,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.clock, self.warnings = folder, clock, warnings
        self.name = str(description["name"])
        before = read_earlier(folder, self.name) if start else {}
        self.description = dict(description)
        self.earlier_warnings: list[dict[str, Any]] = before.get("warnings", [])
        now = time.time()
        self.session: dict[str, Any] = {
            "started": now, "updated": now, "start": start, "step": start, "seconds_per_step": 0.0, "state": "running",
            "images_per_second": 0.0, "peak_memory": None,
        }  # fmt: skip
        earlier = [session for session in before.get("sessions", []) if session["start"] < start]
        self.description["sessions"] = [*earlier, self.session]
        self.curves, self.thumbnails = Curves(folder / f"{self.name}{METRICS_SUFFIX}"), Thumbnails()
        self.images = ImageWatch(folder, self.name)
        self.written, self.cost = -1e9, 0.0
        warnings.step = start

    def advance(self, step: int, speed: Speed) -> None:
        """Call after a step was written to the metrics file; updates the page when due. speed: of recent steps."""
        self.session |= {"step": step, "seconds_per_step": speed.seconds}
        self.session |= {"images_per_second": speed.images_per_second, "peak_memory": speed.peak_memory}
        self.warnings.step = step
        if self.clock() - self.written >= max(UPDATE_SECONDS, self.cost / MAX_SHARE):
            self.write()

    def publish(self) -> None:
        """Call after something was saved or sampled."""
        if self.clock() - self.written >= self.cost / MAX_SHARE_AT_SAVES:
            self.write()

    def close(self, error: BaseException | None, *, total: int) -> None:
        """Write the last update: finished, stopped, or failed with the error."""
        stop_collecting(self.warnings)
        if error is None:
            self.session["state"] = "finished" if self.session["step"] >= total else "stopped"
        elif isinstance(error, KeyboardInterrupt):
            self.session["state"] = "stopped"
        else:
            self.session["state"] = "failed"
            self.session["error"] = describe_failure(error)
        self.write()

    def write(self) -> None:
        """Write both files. After a failure, whatever it is, the next time is when the next update is due."""
        start = self.clock()
        self.session["updated"] = time.time()
        self.description["warnings"] = [*self.earlier_warnings, *self.warnings.entries()]
        try:
            write_description(self.folder / f"{self.name}{DESCRIPTION_SUFFIX}", self.description)
            write_page(self.folder, self.description, self.curves, self.thumbnails, self.images)
        finally:
            self.written = self.clock()
            self.cost = self.written - start


def describe_failure(error: BaseException) -> str:
    """Without paths and secrets."""
    text = str(error) if isinstance(error, UserError) else repr(error)
    return strip_paths(redact(text, collect_machine_secrets()))


def read_earlier(folder: Path, name: str) -> dict[str, Any]:
    """The description of the run that is resumed; {} where there is none or it is unreadable."""
    path = folder / f"{name}{DESCRIPTION_SUFFIX}"
    try:
        return read_description(path) if path.is_file() else {}
    except UserError:
        return {}


def write_page(
    folder: Path, description: Mapping[str, Any], curves: Curves, thumbnails: Thumbnails, images: ImageWatch
) -> Path:
    curves.read()
    sessions, name = description["sessions"], description["name"]
    has_first = sessions and sessions[0]["start"] == 0  # else samples from before the first session may be its own
    since = time.strftime("%Y%m%d%H%M%S", time.localtime(sessions[0]["started"])) if has_first else ""
    grid = thumbnails.make_grid(
        folder / "sample",
        name,
        steps_per_epoch=description["steps_per_epoch"],
        last=sessions[-1]["step"] if sessions else curves.last,
        since=since,
    )
    path = folder / f"{name}.report.html"
    files.write_text(path, render_page(description, curves, grid, image_sections=images.render(curves)))
    return path


def rebuild_report(folder: Path, name: str | None) -> Path:
    """Write the page again from the files of a run; returns its path. UserError without exactly one run to choose."""
    name = find_run_name(folder, name)
    path = folder / f"{name}{DESCRIPTION_SUFFIX}"  # missing after a run with --no_report, unlike its curves
    description = {**(read_description(path) if path.is_file() else EMPTY_DESCRIPTION), "name": name}
    curves = Curves(folder / f"{name}{METRICS_SUFFIX}")
    return write_page(folder, description, curves, Thumbnails(), ImageWatch(folder, name))


def find_run_name(folder: Path, name: str | None) -> str:
    """`name`, or that of the only run in the folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", code="report-folder-missing")
    names: set[str] = set()
    for suffix in (METRICS_SUFFIX, DESCRIPTION_SUFFIX):
        names.update(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))
    if not names:
        raise UserError(f"{folder} holds no run", code="report-without-run", fix="give the --output_dir of a run")
    advice = f"--name with one of {', '.join(sorted(names))}"
    if name is None and len(names) > 1:
        raise UserError(f"{folder} holds several runs", code="report-run-ambiguous", fix=advice)
    if name is not None and name not in names:
        raise UserError(f"{folder} holds no run {name!r}", code="report-run-unknown", fix=advice)
    return name or next(iter(names))
