"""Every text that a user can see stands in one reviewed listing."""

from __future__ import annotations

import ast

from pages import page_maker


def test_the_listing_is_up_to_date() -> None:
    maker = page_maker("make_messages")
    assert maker.LISTING.read_text(encoding="utf-8") == maker.listing(), "run `make pages`, and read what changed"


def test_what_counts_as_a_message() -> None:
    code = '"""A docstring, no message."""\nx = f"{count} images are damaged" if y else "one"\nz = "a" + "two words"\n'
    code += "v = f\"{path} has {plural(len(x), 'entry', 'entries')} and {plural(n, 'key')}\""
    assert list(page_maker("make_messages").messages(ast.parse(code))) == [
        *("{count} images are damaged", "two words"),
        "{path} has {len(x)} entries and {n} keys",
    ]
