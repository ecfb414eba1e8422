"""A dataset as one page that needs no other file: faults, numbers, buckets, tags, and images after the crop."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from sfumato.common.text import plural
from sfumato.data.find.inspect import DatasetInspection, SubsetInspection
from sfumato.data.plans import DataPlan
from sfumato.tools.dataset_text import format_repeats

THUMBNAIL_SIDE = 320  # longest side of an image on the page, in pixels
THUMBNAIL_QUALITY = 78
MAX_LISTED_FILES = 100  # that a row names

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d6670; --line: #dfe3e8; --paper: #fff; --card: #f6f7f9;
  --mark: #3d6fb4; --bad: #b3261e; --bad-card: #fdeeed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa4af; --line: #333a42; --paper: #15181c;
  --card: #1e2227; --mark: #7fabe6; --bad: #ff8a80; --bad-card: #3a2020; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h4 { font-size: .95rem; margin: 1.5rem 0 .5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; margin: 0; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; display: flex;
  flex-direction: column-reverse; justify-content: flex-end; }
.tiles dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tiles dt { color: var(--soft); }
.faults { background: var(--bad-card); border-left: .25rem solid var(--bad); border-radius: .25rem;
  padding: .75rem 1rem; margin: 1.25rem 0; overflow-wrap: anywhere; } .faults strong { color: var(--bad); }
.faults ul { margin: .4rem 0 0; padding-left: 1.2rem; }
.notes { color: var(--soft); padding-left: 1.2rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); } tbody th { width: 13rem; }
td.n, th.n { text-align: right; white-space: nowrap; width: 6rem; }
.bad { color: var(--bad); }
td:has(+ .n), th:has(+ .n) { width: 8rem; }
td.bar { padding-right: 0; } td.bar span { display: block; height: .7rem; margin-top: .35rem;
  border-radius: .2rem; background: var(--mark); min-width: 2px; }
.tags { display: flex; flex-wrap: wrap; gap: .35rem; padding: 0; margin: 0; list-style: none; }
.tags li { background: var(--card); border-radius: 1rem; padding: .1rem .65rem; overflow-wrap: anywhere; }
.tags b { color: var(--soft); font-weight: 500; margin-left: .35rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem .9rem;
  align-items: end; }
figure { margin: 0; min-width: 0; align-self: start; } figure img { width: 100%; height: auto; max-height: 18rem;
  object-fit: contain; object-position: left; border-radius: .3rem; display: block; }
figcaption { font-size: .8rem; line-height: 1.35; margin-top: .3rem; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); display: block; } figcaption p { margin: .15rem 0 0; display: -webkit-box;
  -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
details { margin: 0; } details ul { margin: .2rem 0; padding-left: 1.4rem; } summary { cursor: pointer; }
@media (max-width: 40rem) { body { padding: 1.25rem .9rem 3rem; } tbody th { width: 8rem; }
  .sheet { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
  td.n, th.n { width: 4.5rem; } td:has(+ .n), th:has(+ .n) { width: 6rem; } }
"""


@dataclass(frozen=True, kw_only=True)
class PageImage:
    """One image of the page with its text."""

    image: Image.Image
    title: str
    facts: str
    caption: str


def render_dataset_page(
    plan: DataPlan,
    datasets: Sequence[DatasetInspection],
    images: Sequence[Sequence[Sequence[PageImage]]],
    *,
    faults: Sequence[str] = (),
    notes: Sequence[str] = (),
    samples: Sequence[PageImage] = (),
) -> str:
    """The page as HTML. images: of each subset of each dataset. samples: what the first steps are trained on."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Dataset</title><style>{STYLE}</style></head><body><h1>Dataset</h1>",
        *render_overview(plan, datasets),
        *render_faults(faults),
    ]
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f'<ul class="notes">{items}</ul>')
    for dataset, dataset_images in zip(datasets, images, strict=True):
        parts += render_dataset(dataset, alone=len(datasets) == 1)
        for subset, subset_images in zip(dataset.subsets, dataset_images, strict=True):
            parts += render_subset(subset, subset_images)
    if samples:
        parts.append("<h2>What the first steps are trained on</h2>")
        parts += render_images(samples)
    return "\n".join([*parts, "</body></html>\n"])


def render_overview(plan: DataPlan, datasets: Sequence[DatasetInspection]) -> Iterator[str]:
    """A tile per number; those of faults in red where they are above 0."""
    subsets: list[SubsetInspection] = []
    for dataset in datasets:
        subsets += dataset.subsets
    tiles = {
        "images": sum(len(subset.plan.items) for subset in subsets),
        "samples per epoch": plan.samples_per_epoch,
        "batches per epoch": plan.batches_per_epoch,
        "validation images": plan.num_validation_images,
        "unreadable": sum(len(subset.no_images) + len(subset.damaged) for subset in subsets),
        "empty captions": sum(len(subset.empty) for subset in subsets),
    }
    html = ""
    for name, count in tiles.items():
        bad = ' class="bad"' if count and name in ("unreadable", "empty captions") else ""
        if count or name != "validation images":
            html += f"<div><dt>{name}</dt><dd{bad}>{count:,}</dd></div>"
    yield f'<dl class="tiles">{html}</dl>'


def render_faults(faults: Sequence[str]) -> Iterator[str]:
    if faults:
        items = "".join(f"<li>{escape(fault)}</li>" for fault in faults)
        yield f'<section class="faults"><strong>Training would stop here</strong><ul>{items}</ul></section>'


def render_dataset(dataset: DatasetInspection, *, alone: bool) -> Iterator[str]:
    """The heading of a dataset and the table of its buckets."""
    settings = dataset.plan.settings
    width, height = settings.resolution
    name = "Buckets" if alone else escape(dataset.name.capitalize())
    yield f"<h2>{name}</h2><p>{width}×{height}, batch size {settings.batch_size}</p>"
    buckets = dataset.plan.buckets
    most = max(buckets.values(), default=1)
    rows = "".join(
        f'<tr><td>{w}×{h}</td><td class="n">{count:,}</td><td class="n">{dataset.enlarged.get((w, h), 0):,}</td>'
        f'<td class="bar"><span style="width:{100 * count / most:.1f}%"></span></td></tr>'
        for (w, h), count in buckets.items()
    )
    head = '<tr><th>bucket</th><th class="n">samples</th><th class="n">enlarged</th><th></th></tr>'
    yield f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def render_subset(subset: SubsetInspection, images: Sequence[PageImage]) -> Iterator[str]:
    """The facts about a subset, its tags and its images."""
    kind = ", regularization" if subset.plan.settings.is_reg else ""
    yield f"<h3>{escape(subset.name)}{kind}</h3><table><tbody>"
    yield from render_facts(subset)
    yield "</tbody></table>"
    if subset.tags:
        chips = "".join(f"<li>{escape(tag)}<b>{number:,}</b></li>" for tag, number in subset.tags)
        more = subset.distinct_tags - len(subset.tags)
        chips += f"<li>and {more:,} more</li>" if more else ""
        yield f'<h4>Tags</h4><ul class="tags">{chips}</ul>'
    if images:
        yield f"<h4>As the model sees them ({len(images)} of {len(subset.plan.items)})</h4>"
        yield from render_images(images)


def render_facts(subset: SubsetInspection) -> Iterator[str]:
    """The rows of a subset's table."""
    settings, count = subset.plan.settings, len(subset.plan.items)
    repeats = format_repeats(settings.num_repeats)
    yield render_row("images", f"{count:,}, {repeats} each: {plural(subset.plan.num_samples, 'sample')} per epoch")
    yield from render_files("not images", dict.fromkeys(subset.no_images, ""))
    yield from render_files("damaged", {Path(path).name: reason for path, reason in subset.damaged.items()})
    yield from render_files("with transparent parts", dict.fromkeys(subset.transparent, ""))
    counts = subset.caption_extensions.items()
    extensions = ", ".join(f"{number:,} {escape(extension)}" for extension, number in counts)
    yield render_row("caption files", extensions or "none")
    if subset.class_tokens:
        yield render_row("from class_tokens", f"{subset.class_tokens:,}: {escape(settings.class_tokens or '')}")
    yield from render_files("empty captions", dict.fromkeys((Path(path).name for path in subset.empty), ""))
    if subset.masks:
        yield render_row(subset.masks_name, escape(subset.masks))
    if subset.references:
        yield render_row("reference images", escape(subset.references))
    for name, tokens in subset.tokens.items():
        cut = (
            f'<span class="bad">{tokens.over:,} of {plural(count, "caption is", "captions are")} cut</span>'
            if tokens.over
            else ""
        )
        longest = f"<details><summary>the longest has {tokens.longest} of {tokens.limit}</summary>"
        yield render_row(f"tokens ({escape(name)})", f"{cut}{longest}{escape(tokens.caption)}</details>")


def render_row(name: str, value: str) -> str:
    return f"<tr><th>{name}</th><td>{value}</td></tr>"


def render_files(name: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """A row with a list that unfolds, of files and what is wrong with each; nothing where there are none."""
    if not reasons:
        return
    items = ""
    for file, reason in list(reasons.items())[:MAX_LISTED_FILES]:
        items += f"<li>{escape(f'{file} {reason}'.strip())}</li>"
    count = len(reasons)
    more = f"<li>and {count - MAX_LISTED_FILES:,} more</li>" if count > MAX_LISTED_FILES else ""
    unfolded = " open" if count <= 5 else ""
    summary = f'<summary class="bad">{count:,}</summary>'
    yield render_row(name, f"<details{unfolded}>{summary}<ul>{items}{more}</ul></details>")


def render_images(images: Sequence[PageImage]) -> Iterator[str]:
    yield '<div class="sheet">'
    for entry in images:
        small = entry.image.copy()
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        facts = f"<strong>{escape(entry.title)}</strong><span>{escape(entry.facts)}</span>"
        caption = f'<p title="{escape(entry.caption)}">{escape(entry.caption) or "<em>empty caption</em>"}</p>'
        image = f'<img src="{embed_image(small)}" width="{small.width}" height="{small.height}" alt="" loading="lazy">'
        yield f"<figure>{image}<figcaption>{facts}{caption}</figcaption></figure>"
    yield "</div>"


def embed_image(image: Image.Image) -> str:
    """The image as a data URL."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
