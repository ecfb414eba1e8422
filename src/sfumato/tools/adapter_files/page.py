"""An adapter file as a page that needs no other file: where its change is, how it is made up, what is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from sfumato import __version__
from sfumato.common import files
from sfumato.common.text import format_bytes, plural
from sfumato.errors import UserError
from sfumato.tools.adapter_files.inspect import (
    SHOWN_METADATA,
    FileFacts,
    LayerFacts,
    average_effective_rank,
    describe_layers,
    describe_values,
    sum_norms,
)
from sfumato.track.charts.chart import Axis, Bars, Chart, Line, make_step_axis, make_zero_axis
from sfumato.track.charts.svg import render_figure
from sfumato.track.html import make_document, make_table

PAGE_COLORS = 8  # in the style
MOST_BLOCKS = 8  # with the largest changes that are named
LONGEST_VALUE_SHOWN = 400  # letters of an entry of the metadata
UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One block, or what is outside of all, as a bar."""

    name: str
    group: str  # the bars of one color
    layers: Sequence[LayerFacts]


def render_adapter_page(facts: FileFacts) -> str:
    """The HTML file. Every text from the file is escaped."""
    rows = list_blocks(facts)
    body = [
        render_head(facts),
        *render_problems(facts),
        *render_block_charts(rows),
        *render_places(rows),
        *render_layer_kinds(facts),
        render_all_layers(facts),
        *render_metadata(facts.metadata),
        f"<footer>{escape(f'sfumato {__version__} · {facts.path.name} · {format_bytes(facts.size)}')}</footer>",
    ]
    return make_document(f"{facts.path.name}: what it does", body)


def check_page_path(path: Path) -> None:
    """UserError where a page must not be written."""
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise UserError(
            f"--html {path}: a page's name ends in .html", code="page-path", fix=f"--html {path.with_suffix('.html')}"
        )


def write_adapter_page(facts: FileFacts, path: Path) -> str:
    """Write the page; the line of the report."""
    replaced = " (replaced)" if path.exists() else ""
    files.write_text(path, render_adapter_page(facts))
    return f"{path}{replaced}: page written"


def list_blocks(facts: FileFacts) -> list[BlockRow]:
    """In the order of the model's blocks; groups are e.g. denoiser.up_blocks."""
    rows: list[BlockRow] = []
    for (part, block), layers in facts.blocks.items():
        first = block.partition(".")[0] or "outside of blocks"
        rows.append(BlockRow(name=f"{part}.{block}" if block else part, group=f"{part}.{first}", layers=layers))
    return rows


def render_head(facts: FileFacts) -> str:
    count = len(facts.problems)
    state = "finished" if not count else "stopped"
    problems = "no problems found" if not count else plural(count, "problem")
    writer = f" · names of {facts.writer}" if facts.writer else ""
    subtitle = f"{facts.family or 'of no known model'} · {describe_layers(facts.layers)}{writer}"
    listed = {
        "layers": f"{len(facts.layers):,}",
        "rank": describe_values([layer.rank for layer in facts.layers]),
        "alpha": describe_values([layer.alpha for layer in facts.layers]),
        "norm of the change": format_optional(sum_norms(facts.layers)),
        "effective rank": format_optional(average_effective_rank(facts.layers), ".1f"),
        "size": format_bytes(facts.size),
        "stored as": ", ".join(facts.dtypes),
    }
    listed |= {title: facts.metadata[key] for title, key in SHOWN_METADATA.items() if key in facts.metadata}
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in listed.items())
    return (
        f'<header><div class="over"><h1>{escape(facts.path.name)}</h1><span class="state {state}">{problems}</span>'
        f"</div>"
        f'<p class="subtitle">{escape(subtitle)}</p><br><dl class="facts">{items}</dl></header>'
    )


def format_optional(value: float | None, spec: str = ".4g") -> str:
    return UNKNOWN if value is None else format(value, spec)


def render_problems(facts: FileFacts) -> Iterator[str]:
    if facts.problems:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in facts.problems)
        yield f'<section class="warnings"><h2>Problems</h2><ul>{items}</ul></section>'


# ---------------------------------------------------------------- charts


def render_block_charts(rows: Sequence[BlockRow]) -> Iterator[str]:
    """Norm, effective rank and spectrum; nothing where only the model's weights would tell them."""
    known = [row for row in rows if sum_norms(row.layers) is not None]
    if not known:
        yield (
            '<section><h2>Changes</h2><p class="note">How large the changes are depends on the weights of the model.'
            "</p></section>"
        )
        return
    table = make_block_table(rows)
    norm = make_block_chart("Norm of the change, by block", known, lambda row: sum_norms(row.layers))
    yield render_figure(norm, "norms", table=table, wide=True)
    rank = make_block_chart("Effective rank, by block", known, lambda row: average_effective_rank(row.layers))
    figures = [render_figure(rank, "ranks", table=table)]
    spectrum = make_spectrum_chart(known)
    figures += [render_figure(spectrum, "spectrum")] if spectrum.lines else []
    yield f'<div class="pair">{"".join(figures)}</div>'


def make_block_chart(title: str, rows: Sequence[BlockRow], measure: Callable[[BlockRow], float | None]) -> Chart:
    """A bar for each block, in the color of its group, with a gap between groups."""
    places: dict[str, list[tuple[int, float]]] = defaultdict(list)
    place, before = 0, rows[0].group
    for row in rows:
        place += row.group != before
        places[row.group].append((place, measure(row) or 0.0))
        place, before = place + 1, row.group
    bars: list[Bars] = []
    for number, (group, found) in enumerate(places.items()):
        left = np.array([float(start) for start, _ in found])
        heights = np.array([value for _, value in found])
        bars.append(Bars(name=group, left=left + 0.08, right=left + 0.92, y=heights, color=number % PAGE_COLORS))
    high = max(float(each.y.max()) for each in bars) or 1.0
    return Chart(title=title, bars=bars, x=Axis(low=0.0, high=float(place)), y=make_zero_axis(1.06 * high))


def make_block_table(rows: Sequence[BlockRow]) -> str:
    heads = ["block", "layers", "rank", "alpha", "norm", "effective rank"]
    return make_table(heads, [[row.name, *describe_several(row.layers)] for row in rows], caption="By block")


def describe_several(layers: Sequence[LayerFacts]) -> list[str]:
    """Number, rank, alpha, norm and effective rank of some layers."""
    return [
        f"{len(layers):,}",
        describe_values([layer.rank for layer in layers]),
        describe_values([layer.alpha for layer in layers]),
        format_optional(sum_norms(layers)),
        format_optional(average_effective_rank(layers), ".1f"),
    ]


def make_spectrum_chart(rows: Sequence[BlockRow]) -> Chart:
    """For each group the average of its layers' singular values, each by its largest."""
    groups: dict[str, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        groups[row.group] += [np.array(layer.values) / layer.values[0] for layer in row.layers if layer.norm]
    lines: list[Line] = []
    for number, (group, found) in enumerate(groups.items()):
        length = min(map(len, found), default=0)
        if length > 1:
            average = np.mean([values[:length] for values in found], axis=0)
            lines.append(Line(name=group, x=np.arange(1.0, length + 1), y=average, color=number % PAGE_COLORS))
    last = max((float(line.x[-1]) for line in lines), default=2.0)
    return Chart(
        title="Singular values, by the largest",
        lines=lines,
        x=make_step_axis(1.0, last, name="value"),
        y=make_zero_axis(1.06),
        note="Where a curve falls to the right, further ranks hardly matter: a resized file does the same.",
    )


# ---------------------------------------------------------------- tables


def render_places(rows: Sequence[BlockRow]) -> Iterator[str]:
    """Where the change is: the share of each group, and the blocks with the largest."""
    whole = sum((sum_norms(row.layers) or 0.0) ** 2 for row in rows)
    if not whole:
        return
    shares: dict[str, float] = defaultdict(float)
    for row in rows:
        shares[row.group] += (sum_norms(row.layers) or 0.0) ** 2 / whole
    groups = [[group, f"{share:.1%}"] for group, share in sorted(shares.items(), key=lambda item: -item[1])]
    largest = sorted(rows, key=lambda row: -(sum_norms(row.layers) or 0.0))[:MOST_BLOCKS]
    blocks = [[row.name, f"{(sum_norms(row.layers) or 0.0) ** 2 / whole:.1%}"] for row in largest]
    heads = ["", "share of the squared norm"]
    first = make_table(heads, groups, caption="Groups of blocks", style="words plain")
    second = make_table(heads, blocks, caption="Blocks that change most", style="words plain")
    yield f"<section><h2>Where the change is</h2>{first}{second}</section>"


def render_layer_kinds(facts: FileFacts) -> Iterator[str]:
    """What is changed inside of blocks: the same layer of all of them together."""
    found: dict[str, list[LayerFacts]] = defaultdict(list)
    for layer in facts.layers:
        if layer.part:
            found[f"{layer.part}: {layer.layer}"].append(layer)
    if found:
        heads = ["layer", "count", "rank", "alpha", "norm", "effective rank"]
        rows = [[name, *describe_several(layers)] for name, layers in found.items()]
        yield f"<section><h2>Kinds of layers</h2>{make_table(heads, rows, caption='Of all blocks')}</section>"


def render_all_layers(facts: FileFacts) -> str:
    rows = [[layer.name, layer.kinds, *describe_several([layer])[1:], largest_value(layer)] for layer in facts.layers]
    heads = ["name in the file", "kind", "rank", "alpha", "norm", "effective rank", "largest singular value"]
    table = make_table(heads, rows, caption="In the order of the file")
    return f"<section><h2>Layers</h2><details><summary>All {len(rows):,}</summary>{table}</details></section>"


def largest_value(layer: LayerFacts) -> str:
    return format_optional(layer.values[0] if layer.values else None)


def render_metadata(metadata: Mapping[str, str]) -> Iterator[str]:
    if not metadata:
        return
    rows = [[name, shorten_text(value)] for name, value in sorted(metadata.items())]
    table = make_table(["entry", "value"], rows, caption="As the file has it", style="words")
    count = f"{len(rows):,} {'entry' if len(rows) == 1 else 'entries'}"
    yield f"<section><h2>Metadata</h2><details><summary>{count}</summary>{table}</details></section>"


def shorten_text(text: str) -> str:
    if len(text) <= LONGEST_VALUE_SHOWN:
        return text
    return f"{text[:LONGEST_VALUE_SHOWN]}... ({plural(len(text), 'letter')})"
