"""The page of a run's report, made of its description and its curves. Every text from outside is escaped."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

from sfumato.track.progress import duration
from sfumato.track.report_curves import Curves, by_level
from sfumato.track.report_draw import COLOURS, Chart, Line, drawn, level_bars, shown, table
from sfumato.track.report_samples import Grid, Thumbnail
from sfumato.track.report_style import CSS, SCRIPT

STATES = {
    "running": "running", "finished": "finished", "stopped": "stopped", "failed": "ended by an error",
    "silent": "no word since",
}  # fmt: skip
MOST_OTHERS = 6  # charts of further series
HELD_OUT = "loss/validation/"
VALIDATION, LEVEL = f"{HELD_OUT}step_average", re.compile(rf"{HELD_OUT}t(\d+)")
OWN = ("loss/current", "loss/average", "loss/epoch_average", "grad_norm")


def page(description: Mapping[str, Any], curves: Curves, grid: Grid, *, now: float | None = None) -> str:
    """The whole file. now: Unix time, to tell a run that goes on from one that ended without a word."""
    state = state_of(description["sessions"], time.time() if now is None else now)
    name, sessions = escape(description["name"]), description["sessions"]
    until, silent = (patience(sessions[-1]), state_text("silent", sessions)) if sessions else (0.0, "")
    body = [
        header(description, curves, state),
        *warnings(description),
        *charts(description, curves),
        *samples(grid),
        *configuration(description),
        *dataset(description["data"]),
        *notes(description["notes"]),
        footer(description),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{name}: {STATES[state]}</title>\n<style>{CSS}</style>\n</head>\n"
        f'<body data-state="{state}" data-until="{until:.0f}" data-silent="{escape(silent)}">\n<main>\n'
        + "\n".join(body)
        + f"\n</main>\n<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def state_of(sessions: Sequence[Mapping[str, Any]], now: float) -> str:
    """ "silent" where a run says that it goes on, but should have written long ago."""
    if not sessions:
        return "silent"
    last = sessions[-1]
    if last["state"] != "running":
        return last["state"] if last["state"] in STATES else "silent"
    return "silent" if now > patience(last) else "running"


def patience(session: Mapping[str, Any]) -> float:
    """Until when a run that goes on must have written again, Unix time."""
    return session["updated"] + max(1800, 100 * session["seconds_per_step"])


# ---------------------------------------------------------------- the head of the page


def header(description: Mapping[str, Any], curves: Curves, state: str) -> str:
    sessions, total = description["sessions"], description["total"]
    done = sessions[-1]["step"] if sessions else curves.last
    part = 100 * done / total if total else 0
    what = " · ".join(escape(each) for each in (description["model"], description["method"]) if each)
    told = "".join(
        f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts(description, curves, done, state)
    )
    error = sessions[-1].get("error", "") if sessions else ""
    failure = f'<p class="failure">{escape(error)}</p>' if error else ""
    return (
        f'<header><div class="over"><h1>{escape(description["name"])}</h1>'
        f'<span class="state {state}">{state_text(state, sessions)}</span></div><p class="what">{what}</p>'
        f'<div class="way" role="progressbar" aria-label="steps done" aria-valuemin="0" aria-valuemax="{total}" '
        f'aria-valuenow="{done}"><i style="width:{part:.2f}%"></i></div><dl class="facts">{told}</dl>{failure}</header>'
    )


def state_text(state: str, sessions: Sequence[Mapping[str, Any]]) -> str:
    if not sessions:
        return "state not known"
    if state == "silent":
        return f"{STATES[state]} {moment(sessions[-1]['updated'])}"
    return STATES[state]


def facts(description: Mapping[str, Any], curves: Curves, done: int, state: str) -> Iterator[tuple[str, str]]:
    """Label and value, the value already safe to write."""
    sessions, total = description["sessions"], description["total"]
    yield "step", f"{done:,} <small>of {total:,}</small>" if total else f"{done:,}"
    per_epoch = max(1, description["steps_per_epoch"])
    if total:
        yield "epoch", f"{math.ceil(done / per_epoch):,} <small>of {math.ceil(total / per_epoch):,}</small>"
    _, average = curves.xy("loss/average")
    if len(average):
        yield "average loss", shown(float(average[-1]))
    steps, losses = curves.xy(VALIDATION)
    if len(steps):
        best = int(losses.argmin())
        yield (
            "validation loss",
            f"{shown(float(losses[-1]))} <small>lowest {shown(float(losses[best]))}, step {steps[best]:,.0f}</small>",
        )
    if not sessions:
        return
    pace = sessions[-1]["seconds_per_step"]
    if pace:
        yield (
            "speed",
            f"{pace:.3g} s <small>per step</small>" if pace >= 1 else f"{1 / pace:.3g} <small>steps/s</small>",
        )
    yield "time trained", duration(sum(max(0.0, each["updated"] - each["started"]) for each in sessions))
    if state == "running" and pace:
        yield "time left", duration(pace * (total - done))
    yield "started", moment(sessions[0]["started"])
    label = {"finished": "finished", "stopped": "stopped", "failed": "ended"}.get(state, "last written")
    yield label, moment(sessions[-1]["updated"])
    if len(sessions) > 1:
        at = ", ".join(f"{each['start']:,}" for each in sessions[1:])
        yield "resumed", f"{len(sessions) - 1}× <small>at step {at}</small>"


def moment(seconds: float) -> str:
    return time.strftime("%d %b, %H:%M", time.localtime(seconds))


def warnings(description: Mapping[str, Any]) -> Iterator[str]:
    """Those that were shown during the run."""
    told = description["warnings"]
    if not told:
        return
    items = "".join(f"<li>{escape(each['text'])} <small>{occasion(each)}</small></li>" for each in told)
    title = "1 warning" if len(told) == 1 else f"{len(told)} warnings"
    yield f'<section class="warnings"><h2>{title}</h2><ul>{items}</ul></section>'


def occasion(warning: Mapping[str, Any]) -> str:
    where = f"after step {warning['step']:,}" if warning["step"] else "before the first step"
    return f"{where}, {warning['times']} times" if warning["times"] > 1 else where


# ---------------------------------------------------------------- curves


def charts(description: Mapping[str, Any], curves: Curves) -> Iterator[str]:
    """Loss over the whole width, the others in pairs."""
    raw, average = curves.xy("loss/current"), curves.xy("loss/average")
    if not len(raw[0]):
        yield '<section><h2>Curves</h2><p class="note">There is no step yet.</p></section>'
        return
    lines = [
        Line(name="each step", x=raw[0], y=raw[1], faint=True),
        Line(name="average", x=average[0], y=average[1]),
    ]
    note = "The average runs over an epoch. Single steps beyond the scale are cut off."
    steps, values = curves.xy(VALIDATION)
    if len(steps):
        lines.append(Line(name="validation", x=steps, y=values, colour=1))
        note += " Validation is before any weighting, at the same times with the same noise whenever it is done."
    yield drawn(Chart(key="loss", title="Loss", lines=lines, note=note, marks=curves.lost(), wide=True))
    small = [*levels(curves), *validation(curves), *rates(curves), *norms(description, curves), *others(curves)]
    if small:
        yield f'<div class="pair">{"".join(small)}</div>'


def rates(curves: Curves) -> Iterator[str]:
    """The learning rate of each group; groups whose rates are equal throughout share a line."""
    shared: dict[bytes, list[str]] = {}
    found = {name: curves.xy(name) for name in curves.series if name.startswith("lr/")}
    for name, (steps, values) in found.items():
        if len(steps):
            shared.setdefault(steps.tobytes() + values.tobytes(), []).append(name)
    lines = [
        Line(name=joined([name.removeprefix("lr/") for name in names]), x=found[names[0]][0], y=found[names[0]][1],
             colour=i % COLOURS)
        for i, names in enumerate(shared.values())
    ]  # fmt: skip
    if lines:
        yield drawn(Chart(key="rates", title="Learning rate", lines=lines, robust=False))


def joined(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def norms(description: Mapping[str, Any], curves: Curves) -> Iterator[str]:
    steps, values = curves.xy("grad_norm")
    if not len(steps):
        return
    clip = float(description["clip"] or 0)
    line = Line(name="before clipping" if clip > 0 else "norm", x=steps, y=values, colour=1)
    limit = (f"clipped at {shown(clip)}", clip) if clip > 0 else None
    beyond = float(np.mean(values > clip)) if clip > 0 else 0.0
    note = f"{100 * beyond:.3g} % of the steps were clipped at {shown(clip)}." if clip > 0 else ""
    yield drawn(Chart(key="norms", title="Gradient norm", lines=[line], limit=limit, note=note))


def levels(curves: Curves) -> Iterator[str]:
    found = by_level(curves)
    if found:
        yield level_bars(found)


def validation(curves: Curves) -> Iterator[str]:
    """The loss of the held-out images at each of their times."""
    times = sorted(int(found[1]) for found in map(LEVEL.fullmatch, curves.series) if found)
    named = {t: curves.xy(f"{HELD_OUT}t{t}") for t in times}
    lines = [Line(name=f"t = {t}", x=x, y=y, colour=i) for i, (t, (x, y)) in enumerate(named.items()) if len(x)]
    if lines:
        note = "Mean loss of the held-out images at each of their times, 0 clean to 1000 noise."
        yield drawn(
            Chart(key="validation", title="Validation loss by noise level", lines=lines, note=note, robust=False)
        )


def others(curves: Curves) -> Iterator[str]:
    """Whatever else the run wrote down, a chart for each group of names."""
    groups: dict[str, list[str]] = {}
    for name in curves.series:
        if name not in OWN and not name.startswith(("lr/", HELD_OUT)) and len(curves.xy(name)[0]):
            groups.setdefault(name.rpartition("/")[0] or name, []).append(name)
    for i, (group, names) in enumerate(list(groups.items())[:MOST_OTHERS]):
        lines = [
            Line(name=name.rpartition("/")[2], x=curves.xy(name)[0], y=curves.xy(name)[1], colour=j)
            for j, name in enumerate(names[:COLOURS])
        ]
        yield drawn(Chart(key=f"other{i}", title=group, lines=lines))


# ---------------------------------------------------------------- pictures


def samples(grid: Grid) -> Iterator[str]:
    """Rows of prompts, columns of steps; a picture leads to its whole file beside the page."""
    if not grid.cells:
        return
    heads = "".join(f'<th scope="col">step {step:,}</th>' for step in grid.steps)
    rows = []
    for number in grid.numbers:
        cells = [grid.cells.get((number, step)) for step in grid.steps]
        latest = next(cell for cell in reversed(cells) if cell)
        prompt = escape(latest.recipe.get("prompt", f"prompt {number + 1}"))
        rows.append(
            f'<tr class="prompt"><th scope="rowgroup" colspan="{len(grid.steps)}">'
            f"<p>{prompt}<small>{recipe(latest)}</small></p></th></tr>"
            f"<tr>{''.join(cell_of(cell, step) for cell, step in zip(cells, grid.steps, strict=True))}</tr>"
        )
    more = (
        f'<p class="note">Pictures of {grid.left_out} more prompts are in the folder sample.</p>'
        if grid.left_out
        else ""
    )
    yield (
        '<section class="samples"><h2>Previews</h2><div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead>{''.join(f'<tbody>{row}</tbody>' for row in rows)}</table></div>"
        f"{more}</section>"
    )


def cell_of(cell: Thumbnail | None, step: int) -> str:
    if cell is None:
        return "<td></td>"
    return (
        f'<td><a href="sample/{escape(quote(cell.file))}"><img src="{cell.uri}" width="{cell.width}" '
        f'height="{cell.height}" alt="{escape(cell.recipe.get("prompt", "preview"))}, after step {step:,}"></a></td>'
    )


def recipe(cell: Thumbnail) -> str:
    known = cell.recipe
    told = [f"{known['width']}×{known['height']}"] if {"width", "height"} <= known.keys() else []
    told += [f"{known['steps']} steps"] if "steps" in known else []
    told += [f"scale {known['scale']}"] if "scale" in known else []
    told += [f"without {known['negative_prompt']}"] if known.get("negative_prompt") else []
    return escape(" · ".join(told))


# ---------------------------------------------------------------- what the run was asked for


def configuration(description: Mapping[str, Any]) -> Iterator[str]:
    rows = [[name, value, source] for name, value, source in description["options"]]
    trains = [[part, f"{layers:,}", f"{size:,}", shown(rate)] for part, layers, size, rate in description["trains"]]
    parts = []
    if trains:
        heads = ["part", "layers", "parameters", "learning rate"]
        parts.append(table(heads, trains, caption="What trains", style="words plain"))
    if rows:
        caption = "Options that are not at their default"
        parts.append(table(["option", "value", "from"], rows, caption=caption, style="words"))
    if parts:
        yield f"<section><h2>Configuration</h2>{''.join(parts)}</section>"


def dataset(datasets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    parts = []
    for i, each in enumerate(datasets, 1):
        title = f"Dataset {i}: " if len(datasets) > 1 else ""
        folders = [
            [
                row["folder"] + (" (regularisation)" if row["is_reg"] else ""),
                *counts(row, "images", "repeats", "samples"),
            ]
            for row in each["subsets"]
        ]
        heads = ["folder", "images", "repeats", "samples per epoch"]
        caption = f"{title}{each['resolution']}, batch size {each['batch_size']}"
        parts.append(table(heads, folders, caption=caption, style="words plain"))
        buckets = [[f"{width}×{height}", f"{count:,}"] for width, height, count in each["buckets"]]
        if len(buckets) > 1:
            parts.append(
                f"<details><summary>{len(buckets)} buckets</summary>"
                + table(["bucket", "samples per epoch"], buckets, caption="Buckets, width × height")
                + "</details>"
            )
    if parts:
        yield f"<section><h2>Data</h2>{''.join(parts)}</section>"


def counts(row: Mapping[str, Any], *names: str) -> Iterable[str]:
    return (f"{row[name]:,}" for name in names)


def notes(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        yield f"<section><h2>Notes before the first step</h2><ul>{items}</ul></section>"


def footer(description: Mapping[str, Any]) -> str:
    told = [f"{name} {version}" for name, version in description["versions"].items()]
    told += [f"on {description['device']}"] if description["device"] else []
    told += [f"seed {description['seed']}"] if description["seed"] is not None else []
    told += [f"checkpoint {description['checkpoint']}"] if description["checkpoint"] else []
    return f"<footer>{escape(' · '.join(told))}</footer>"
