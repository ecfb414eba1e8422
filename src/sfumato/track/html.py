"""Pieces of HTML that several parts of a report use. Every text from outside is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


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
