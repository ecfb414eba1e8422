"""A page of its own about single images, in the style of a run's report; it needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from sfumato.track.image_cards import ImageCard, render_cards
from sfumato.track.report_style import CSS


@dataclass(frozen=True, kw_only=True)
class ImageGroup:
    """Images under one heading; rows: those that belong together, each in a row of its own."""

    title: str
    note: str
    rows: Sequence[Sequence[ImageCard]]


def render_image_page(title: str, subtitle: str, facts: Mapping[str, str], groups: Sequence[ImageGroup]) -> str:
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    sections = "\n".join(map(render_group, groups))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p>'
        f'<dl class="facts tiles">{tiles}</dl></header>\n{sections}\n</main>\n</body>\n</html>\n'
    )


def render_group(group: ImageGroup) -> str:
    rows = "".join(map(render_cards, group.rows))
    return f'<section><h2>{escape(group.title)}</h2><p class="note">{escape(group.note)}</p>{rows}</section>'
