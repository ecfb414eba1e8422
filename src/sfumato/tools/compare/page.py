"""The page of a comparison: which checkpoint to take and why, the scores, and all images side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

import numpy as np
from PIL import Image

from sfumato.config.prompts import Prompt
from sfumato.tools.compare.checkpoints import SavedCheckpoint
from sfumato.tools.compare.choice import CheckpointChoice, Judged
from sfumato.tools.compare.images import ComparedPrompts
from sfumato.tools.compare.style import COMPARE_CSS, COMPARE_SCRIPT
from sfumato.tools.dataset_page import embed_image
from sfumato.track.charts.chart import Chart, Line, find_step_axis, find_value_axis, format_number
from sfumato.track.charts.svg import render_figure
from sfumato.track.report_style import CSS, SCRIPT

THUMBNAIL_SIDES = ((200, 224), (600, 160), (10**9, 112))  # images on the page -> longest side in pixels


@dataclass(frozen=True, kw_only=True)
class ClosestPair:
    """An image and the training image that it is nearest to. distance: 1 - cosine."""

    made: Image.Image
    training: Image.Image
    file: str
    distance: float


@dataclass(frozen=True, kw_only=True)
class ComparedCheckpoint:
    """What the page shows of a checkpoint. images: in the order of the prompts and seeds."""

    checkpoint: SavedCheckpoint
    judged: Judged
    images: Sequence[Image.Image]
    change: float  # root mean square of the pixels of neutral images, 0 .. 1; nan without neutral prompts
    closest: ClosestPair | None = None

    def list_numbers(self) -> dict[str, float | None]:
        """Score -> its value, None where it was not measured."""
        judged, scores = self.judged, self.judged.scores
        numbers = {"value": judged.value, "drift": judged.drift, "memorized": judged.memorized}
        if scores is not None:
            numbers |= {"learned": float(scores.learned.mean()), "to_training": float(scores.to_training.mean())}
            numbers |= {"to_held_out": float(scores.to_held_out.mean()), "nearest": float(scores.nearest.mean())}
            numbers |= {"copied": float(scores.copied.mean())}
        numbers |= {"change": self.change, "validation_loss": judged.validation_loss}
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """All that the page shows."""

    name: str
    model: str
    encoder: str  # "" without one
    prompts: ComparedPrompts
    base: Sequence[Image.Image]
    checkpoints: Sequence[ComparedCheckpoint]
    choice: CheckpointChoice
    notes: Sequence[str]
    image_folder: str
    counts: Mapping[str, int]  # of real images

    @property
    def chosen(self) -> ComparedCheckpoint | None:
        return None if self.choice.index is None else self.checkpoints[self.choice.index]

    def format_lines(self) -> list[str]:
        """The scores and the choice for a terminal."""
        rows = [("", [each.checkpoint.label for each in self.checkpoints])]
        numbers = [each.list_numbers() for each in self.checkpoints]
        shown = [name for name in COLUMNS if any(row.get(name) is not None for row in numbers)]
        rows += [(COLUMNS[name][0], [format_score(name, row.get(name)) for row in numbers]) for name in shown]
        columns = list(zip(*([head, *cells] for head, cells in rows), strict=True))
        widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in columns]
        taken = self.chosen
        verdict = f"take {taken.checkpoint.path.name}" if taken else "no checkpoint to recommend"
        return [*lines, "", f"{verdict}: {' '.join(self.choice.reasons)}", *self.notes]


COLUMNS = {  # number -> heading, explanation
    "value": ("value", "learned, at most 1, less drift, less memorized"),
    "learned": ("learned", "0: as before training; 1: as much like the real images as these are like each other"),
    "drift": ("drift", "of neutral prompts; 0: shown as before; 1: no more than any other prompt's images show them"),
    "memorized": ("memorized", "copies above what new real images would have; 0: no more, 1: every image"),
    "to_training": ("like training", "mean cosine to the training images"),
    "to_held_out": ("like held out", "mean cosine to the images that were held out"),
    "nearest": ("nearest", "1 - cosine to the nearest training image, on average"),
    "copied": (
        "copies",
        "share of the images that are nearer to a training image than any other training image is to that one",
    ),
    "change": ("change", "root mean square of the pixels of neutral images against those before training"),
    "validation_loss": ("validation", "mean loss of the held-out images"),
}

DIGITS = {"nearest": 3, "change": 3, "validation_loss": 4}  # after the point


def render_compare_page(comparison: RunComparison) -> str:
    """The HTML file."""
    body = [
        render_compare_header(comparison),
        render_verdict(comparison),
        render_score_table(comparison),
        *render_image_rows(comparison),
        *render_closest(comparison),
        *render_score_charts(comparison),
        *render_compare_notes(comparison),
    ]
    title = escape(f"{comparison.name}: which checkpoint?")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{CSS}{COMPARE_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n<script>{SCRIPT}{COMPARE_SCRIPT}</script>\n</body>\n</html>\n"
    )


def render_compare_header(comparison: RunComparison) -> str:
    count, prompts = len(comparison.checkpoints), comparison.prompts
    facts = [
        ("checkpoints", f"{count}"),
        ("prompts", f"{len(prompts.concept)} <small>and {len(prompts.neutral)} neutral</small>"),
        ("images each", f"{len(prompts.list_seeded())} <small>seeds {escape(format_seeds(prompts.seeds))}</small>"),
    ]
    if comparison.encoder:
        held_out = comparison.counts["held out"]
        more = f" <small>and {held_out} held out</small>" if held_out else ""
        facts.append(("training images", f"{comparison.counts['training']}{more}"))
        facts.append(("image encoder", escape(comparison.encoder)))
    listed = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    return (
        f"<header><h1>{escape(comparison.name)}: which checkpoint?</h1>"
        f'<p class="subtitle">{escape(comparison.model)}</p><dl class="facts spaced">{listed}</dl></header>'
    )


def format_seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) if len(seeds) <= 4 else f"{seeds[0]} to {seeds[-1]}"


def render_verdict(comparison: RunComparison) -> str:
    taken = comparison.chosen
    title = f"Take <code>{escape(taken.checkpoint.path.name)}</code>" if taken else "No checkpoint to recommend"
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in comparison.choice.reasons)
    return f'<section class="verdict{"" if taken else " none"}"><h2>{title}</h2>{reasons}</section>'


def render_score_charts(comparison: RunComparison) -> Iterator[str]:
    """What the value is made of, and the validation loss, over the steps; EMAs have lines of their own nowhere."""
    plain = [each for each in comparison.checkpoints if not each.checkpoint.ema]
    figures = [
        make_score_chart(plain, "Learned and lost", ("learned", "drift", "memorized", "value")),
        make_score_chart(plain, "Likeness", ("to_training", "to_held_out")),
        make_score_chart(plain, "Validation loss", ("validation_loss",)),
        make_score_chart(plain, "Change of neutral images", ("change",)),
    ]
    drawn = [render_figure(chart, f"scores{i}") for i, chart in enumerate(figures) if chart is not None]
    if drawn:
        yield f'<div class="pair">{"".join(drawn)}</div>'


def make_score_chart(checkpoints: Sequence[ComparedCheckpoint], title: str, names: Sequence[str]) -> Chart | None:
    """Lines of the scores that were measured at two steps or more; None where there are none."""
    lines: list[Line] = []
    for color, name in enumerate(names):
        points = [(each.checkpoint.step, each.list_numbers().get(name)) for each in checkpoints]
        known = [(step, value) for step, value in points if value is not None]
        if len(known) > 1:
            steps, values = np.array(known, dtype=np.float64).T
            lines.append(Line(name=COLUMNS[name][0], x=steps, y=values, color=color))
    if not lines:
        return None
    return Chart(title=title, lines=lines, x=find_step_axis(lines), y=find_value_axis(lines, robust=False))


def render_score_table(comparison: RunComparison) -> str:
    """A row for each checkpoint; columns without a number are omitted."""
    numbers = [each.list_numbers() for each in comparison.checkpoints]
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in numbers)]
    heads = "".join(f'<th scope="col" title="{escape(COLUMNS[name][1])}">{COLUMNS[name][0]}</th>' for name in shown)
    rows: list[str] = []
    for each, row in zip(comparison.checkpoints, numbers, strict=True):
        cells = "".join(f"<td>{format_score(name, row.get(name))}</td>" for name in shown)
        style, mark = (' class="taken"', " ✓") if each is comparison.chosen else ("", "")
        rows.append(f'<tr{style}><th scope="row">{escape(each.checkpoint.label)}{mark}</th>{cells}</tr>')
    legend = "".join(f"<li><b>{COLUMNS[name][0]}</b> {escape(COLUMNS[name][1])}</li>" for name in shown)
    return (
        '<section><h2>Scores</h2><div class="scroll" tabindex="0"><table class="numbers scores">'
        f'<thead><tr><th scope="col">checkpoint</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<details><summary>What they mean</summary><ul class="meanings">{legend}</ul></details></section>'
    )


def format_score(name: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.{DIGITS.get(name, 2)}f}".replace("-", "−")


def render_closest(comparison: RunComparison) -> Iterator[str]:
    """Of each checkpoint the image that is nearest to a training image, beside that one."""
    pairs = [(each, each.closest) for each in comparison.checkpoints if each.closest]
    if not pairs:
        return
    cards: list[str] = []
    for each, pair in pairs:
        style = " taken" if each is comparison.chosen else ""
        made, training = (
            render_image(image, alt, 160) for image, alt in ((pair.made, "made"), (pair.training, "trained on"))
        )
        cards.append(
            f'<li class="closest{style}"><b>{escape(each.checkpoint.label)}</b><div>{made}{training}</div>'
            f"<small>{escape(pair.file)}, distance {format_number(float(f'{pair.distance:.2g}'))}</small></li>"
        )
    yield (
        '<section><h2>Learned by heart?</h2><p class="note">Of each checkpoint the image that is nearest to a training '
        f'image, and that one beside it.</p><ul class="pairs">{"".join(cards)}</ul></section>'
    )


def render_image_rows(comparison: RunComparison) -> Iterator[str]:
    """Rows of prompts and seeds, columns of checkpoints after the model before training."""
    total = len(comparison.base) * (1 + len(comparison.checkpoints))
    side = next(side for most, side in THUMBNAIL_SIDES if total <= most)
    seeds, concept = len(comparison.prompts.seeds), len(comparison.prompts.concept)
    parts = (
        ("Images", comparison.prompts.concept, 0, "c"),
        ("Neutral prompts", comparison.prompts.neutral, concept * seeds, "n"),
    )
    for title, prompts, first, letter in parts:
        if not prompts:
            continue
        rows = "".join(
            render_compared_prompt(comparison, prompt, first + i * seeds, f"{letter}{i:02d}", side)
            for i, prompt in enumerate(prompts)
        )
        yield (
            f'<section class="samples compared"><h2>{title}</h2><div class="strip" tabindex="0">'
            f'<table style="--columns: {1 + len(comparison.checkpoints)}">'
            f"<thead><tr>{render_heads(comparison)}</tr></thead>{rows}</table></div></section>"
        )


def render_heads(comparison: RunComparison) -> str:
    heads = ['<th scope="col">before training</th>']
    for each in comparison.checkpoints:
        style, mark = (' class="taken"', " ✓") if each is comparison.chosen else ("", "")
        heads.append(f'<th scope="col"{style}>{escape(each.checkpoint.label)}{mark}</th>')
    return "".join(heads)


def render_compared_prompt(comparison: RunComparison, prompt: Prompt, first: int, part: str, side: int) -> str:
    """The prompt, and a row of images for each seed. first: the index of its first image. part: of the files' names."""
    columns = [("base", "before training", comparison.base, "")]
    for each in comparison.checkpoints:
        path = each.checkpoint.path
        style = ' class="taken"' if each is comparison.chosen else ""
        columns.append((path.name.removesuffix(path.suffix), each.checkpoint.label, each.images, style))
    rows: list[str] = []
    for i in range(len(comparison.prompts.seeds)):
        cells: list[str] = []
        for name, label, images, style in columns:
            file = quote(f"{comparison.image_folder}/{name}_{part}_{i}.png")
            image = render_image(images[first + i], f"{prompt.prompt}, {label}", side)
            cells.append(f'<td{style}><a href="{escape(file)}">{image}</a></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<tbody><tr class="prompt"><th scope="rowgroup" colspan="{len(columns)}"><p>{escape(prompt.prompt)}</p></th>'
        f"</tr>{''.join(rows)}</tbody>"
    )


def render_image(image: Image.Image, alt: str, side: int) -> str:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return f'<img src="{embed_image(small)}" width="{small.width}" height="{small.height}" alt="{escape(alt)}">'


def render_compare_notes(comparison: RunComparison) -> Iterator[str]:
    if comparison.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
        yield f"<section><h2>Notes</h2><ul>{items}</ul></section>"
