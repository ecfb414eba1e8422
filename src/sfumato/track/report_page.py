"""The page of a run's report, made of its description and its curves. Every text from outside is escaped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from sfumato.common.text import plural
from sfumato.track.charts.chart import format_number
from sfumato.track.html import make_document, make_table
from sfumato.track.progress import format_duration
from sfumato.track.report_charts import VALIDATION, render_curves
from sfumato.track.report_curves import Curves
from sfumato.track.report_samples import PreviewGrid, Thumbnail

STATES = {
    "running": "running", "finished": "finished", "stopped": "stopped", "failed": "ended by an error",
    "silent": "not updated since",
}  # fmt: skip


def render_page(
    description: Mapping[str, Any],
    curves: Curves,
    grid: PreviewGrid,
    *,
    image_sections: Iterable[str] = (),
    now: float | None = None,
) -> str:
    """The HTML file. image_sections: about single training images.

    now: Unix time; a running session that was not updated for long is shown as silent.
    """
    state = find_state(description["sessions"], time.time() if now is None else now)
    sessions = description["sessions"]
    until, silent = (silent_after(sessions[-1]), describe_state("silent", sessions)) if sessions else (0.0, "")
    body = [
        render_header(description, curves, state),
        *render_warnings(description),
        *render_curves(curves, clip=float(description["clip"] or 0)),
        *render_previews(grid),
        *image_sections,
        *render_configuration(description),
        *render_datasets(description["data"]),
        *render_notes(description["notes"]),
        render_footer(description),
    ]
    attributes = f' data-state="{state}" data-until="{until:.0f}" data-silent="{escape(silent)}"'
    return make_document(f"{description['name']}: {STATES[state]}", body, attributes=attributes)


def find_state(sessions: Sequence[Mapping[str, Any]], now: float) -> str:
    """ "silent" for a running session that is overdue."""
    if not sessions:
        return "silent"
    last = sessions[-1]
    if last["state"] != "running":
        return last["state"] if last["state"] in STATES else "silent"
    return "silent" if now > silent_after(last) else "running"


def silent_after(session: Mapping[str, Any]) -> float:
    """The Unix time by which a running session must have updated the page."""
    return session["updated"] + max(1800, 100 * session["seconds_per_step"])


def render_header(description: Mapping[str, Any], curves: Curves, state: str) -> str:
    sessions, total = description["sessions"], description["total"]
    done = sessions[-1]["step"] if sessions else curves.last
    part = 100 * done / total if total else 0
    subtitle = " · ".join(escape(text) for text in (description["model"], description["method"]) if text)
    facts = "".join(
        f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in list_facts(description, curves, done, state)
    )
    error = sessions[-1].get("error", "") if sessions else ""
    failure = f'<p class="failure">{escape(error)}</p>' if error else ""
    return (
        f'<header><div class="over"><h1>{escape(description["name"])}</h1>'
        f'<span class="state {state}">{describe_state(state, sessions)}</span></div><p class="subtitle">{subtitle}</p>'
        f'<div class="progress" role="progressbar" aria-label="steps done" aria-valuemin="0" aria-valuemax="{total}" '
        f'aria-valuenow="{done}"><i style="width:{part:.2f}%"></i></div><dl class="facts">{facts}</dl>'
        f"{failure}</header>"
    )


def describe_state(state: str, sessions: Sequence[Mapping[str, Any]]) -> str:
    if not sessions:
        return "state not known"
    if state == "silent":
        return f"{STATES[state]} {format_time(sessions[-1]['updated'])}"
    return STATES[state]


def list_facts(description: Mapping[str, Any], curves: Curves, done: int, state: str) -> Iterator[tuple[str, str]]:
    """Label and value, the value already safe to write."""
    sessions, total = description["sessions"], description["total"]
    yield "step", f"{done:,} <small>of {total:,}</small>" if total else f"{done:,}"
    per_epoch = max(1, description["steps_per_epoch"])
    if total:
        yield "epoch", f"{math.ceil(done / per_epoch):,} <small>of {math.ceil(total / per_epoch):,}</small>"
    _, average = curves.xy("loss/average")
    if len(average):
        yield "average loss", format_number(float(average[-1]))
    steps, losses = curves.xy(VALIDATION)
    if len(steps):
        best = int(losses.argmin())
        lowest = f"lowest {format_number(float(losses[best]))}, step {steps[best]:,.0f}"
        yield "validation loss", f"{format_number(float(losses[-1]))} <small>{lowest}</small>"
    if sessions:
        yield from list_times(sessions, remaining=total - done, state=state)


def list_times(sessions: Sequence[Mapping[str, Any]], *, remaining: int, state: str) -> Iterator[tuple[str, str]]:
    """Speed, memory, times and resumes; remaining: steps."""
    last = sessions[-1]
    pace, images, memory = last["seconds_per_step"], last["images_per_second"], last["peak_memory"]
    if pace:
        steps = f"{pace:.3g} s <small>per step" if pace >= 1 else f"{1 / pace:.3g} <small>steps/s"
        yield "speed", steps + (f", {images:.3g} images/s" if images else "") + "</small>"
    if memory is not None:
        yield "peak memory", f"{memory / 1e9:.1f} <small>GB</small>"
    yield (
        "time trained",
        format_duration(sum(max(0.0, session["updated"] - session["started"]) for session in sessions)),
    )
    if state == "running" and pace:
        yield "time left", format_duration(pace * remaining)
    yield "started", format_time(sessions[0]["started"])
    label = {"finished": "finished", "stopped": "stopped", "failed": "ended"}.get(state, "last written")
    yield label, format_time(sessions[-1]["updated"])
    if len(sessions) > 1:
        at = ", ".join(f"{session['start']:,}" for session in sessions[1:])
        yield "resumed", f"{len(sessions) - 1}× <small>at step {at}</small>"


def format_time(seconds: float) -> str:
    return time.strftime("%d %b, %H:%M", time.localtime(seconds))


def render_warnings(description: Mapping[str, Any]) -> Iterator[str]:
    """The warnings that were logged during the run."""
    warnings = description["warnings"]
    if not warnings:
        return
    items = "".join(
        f"<li>{escape(warning['text'])} <small>{describe_occasion(warning)}</small></li>" for warning in warnings
    )
    title = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    yield f'<section class="warnings"><h2>{title}</h2><ul>{items}</ul></section>'


def describe_occasion(warning: Mapping[str, Any]) -> str:
    where = f"after step {warning['step']:,}" if warning["step"] else "before the first step"
    return f"{where}, {warning['times']} times" if warning["times"] > 1 else where


def render_previews(grid: PreviewGrid) -> Iterator[str]:
    """Rows of prompts, columns of steps; a thumbnail links to its file in the folder sample."""
    if not grid.cells:
        return
    heads = "".join(f'<th scope="col">step {step:,}</th>' for step in grid.steps)
    rows = "".join(f"<tbody>{render_prompt(grid, number)}</tbody>" for number in grid.prompts)
    more = (
        f'<p class="note">Samples of {plural(grid.omitted, "more prompt")} are in the folder sample.</p>'
        if grid.omitted
        else ""
    )
    yield (
        '<section class="samples"><h2>Samples</h2><div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead>{rows}</table></div>"
        f"{more}</section>"
    )


def render_prompt(grid: PreviewGrid, number: int) -> str:
    """A prompt with its settings, and its samples below."""
    thumbnails = [grid.cells.get((number, step)) for step in grid.steps]
    latest = next(thumbnail for thumbnail in reversed(thumbnails) if thumbnail)
    prompt = escape(latest.settings.get("prompt", f"prompt {number + 1}"))
    cells = "".join(render_cell(thumbnail, step) for thumbnail, step in zip(thumbnails, grid.steps, strict=True))
    return (
        f'<tr class="prompt"><th scope="rowgroup" colspan="{len(grid.steps)}">'
        f"<p>{prompt}<small>{describe_settings(latest.settings)}</small></p></th></tr><tr>{cells}</tr>"
    )


def render_cell(thumbnail: Thumbnail | None, step: int) -> str:
    if thumbnail is None:
        return "<td></td>"
    alt = f"{escape(thumbnail.settings.get('prompt', 'sample'))}, after step {step:,}"
    return (
        f'<td><a href="sample/{escape(quote(thumbnail.file))}"><img src="{thumbnail.uri}" width="{thumbnail.width}" '
        f'height="{thumbnail.height}" alt="{alt}"></a></td>'
    )


def describe_settings(settings: Mapping[str, str]) -> str:
    parts = [f"{settings['width']}×{settings['height']}"] if {"width", "height"} <= settings.keys() else []
    parts += [f"{settings['steps']} steps"] if "steps" in settings else []
    parts += [f"scale {settings['scale']}"] if "scale" in settings else []
    parts += [f"negative prompt: {settings['negative_prompt']}"] if settings.get("negative_prompt") else []
    return escape(" · ".join(parts))


def render_configuration(description: Mapping[str, Any]) -> Iterator[str]:
    """What is trained, and the options of the run."""
    tables: list[str] = []
    trained = [
        [part, f"{layers:,}", f"{size:,}", format_number(lr)] for part, layers, size, lr in description["trained_parts"]
    ]
    if trained:
        heads = ["part", "layers", "parameters", "learning rate"]
        tables.append(make_table(heads, trained, caption="Trained parts", style="words plain"))
    options = [[name, value, source] for name, value, source in description["options"]]
    if options:
        caption = "Options that are not at their default"
        tables.append(make_table(["option", "value", "from"], options, caption=caption, style="words"))
    if tables:
        yield f"<section><h2>Configuration</h2>{''.join(tables)}</section>"


def render_datasets(datasets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of subsets, and one of buckets, for each dataset."""
    tables: list[str] = []
    for number, dataset in enumerate(datasets, 1):
        title = f"Dataset {number}: " if len(datasets) > 1 else ""
        caption = f"{title}{dataset['resolution']}, batch size {dataset['batch_size']}"
        heads = ["folder", "images", "repeats", "samples per epoch"]
        tables.append(make_table(heads, list_subsets(dataset), caption=caption, style="words plain"))
        buckets = [[f"{width}×{height}", f"{count:,}"] for width, height, count in dataset["buckets"]]
        if len(buckets) > 1:
            table = make_table(["bucket", "samples per epoch"], buckets, caption="Buckets, width × height")
            tables.append(f"<details><summary>{plural(len(buckets), 'bucket')}</summary>{table}</details>")
    if tables:
        yield f"<section><h2>Data</h2>{''.join(tables)}</section>"


def list_subsets(dataset: Mapping[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    for subset in dataset["subsets"]:
        folder = subset["folder"] + (" (regularization)" if subset["is_reg"] else "")
        rows.append([folder, *(f"{subset[name]:,}" for name in ("images", "repeats", "samples"))])
    return rows


def render_notes(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        yield f"<section><h2>Notes before the first step</h2><ul>{items}</ul></section>"


def render_footer(description: Mapping[str, Any]) -> str:
    parts = [f"{name} {version}" for name, version in description["versions"].items()]
    parts += [f"on {description['device']}"] if description["device"] else []
    parts += [f"seed {description['seed']}"] if description["seed"] is not None else []
    parts += [f"checkpoint {description['checkpoint']}"] if description["checkpoint"] else []
    return f"<footer>{escape(' · '.join(parts))}</footer>"
