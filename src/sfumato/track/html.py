"""Pieces of HTML that several parts of a report use. Every text from outside is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sfumato.track.report_style import CSS, SCRIPT


def make_document(title: str, body: Sequence[str], *, attributes: str = "") -> str:
    """A page that needs no other file. title: as it is; body: safe pieces of HTML; attributes: of the body, safe."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body{attributes}>\n<main>\n" + "\n".join(body) + f"\n</main>\n<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def make_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, style: str = "numbers") -> str:
    """A table that scrolls sideways; the first column names its row."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(make_row(row) for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{style}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def make_row(row: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in row[1:])
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'
