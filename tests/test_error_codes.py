"""Every error has a code of its own, and docs/errors.md lists it."""

from __future__ import annotations

import ast
import re
from collections import Counter

from house_rules import FILES, parsed_file, relative_name
from pages import page_maker


def test_every_user_error_has_a_code() -> None:
    """A literal, or one that is handed on."""
    silent: list[str] = []
    for path in FILES:
        for node in ast.walk(parsed_file(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "UserError":
                if "code" not in {keyword.arg for keyword in node.keywords}:
                    silent.append(f"{relative_name(path)}:{node.lineno}")
    assert not silent


def test_codes_are_unique_words_with_hyphens() -> None:
    entries = list(page_maker("make_errors").entries())
    counts = Counter(entry.code for entry in entries)
    assert not [entry for entry in entries if counts[entry.code] > 1]
    assert not [entry for entry in entries if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", entry.code)]


def test_the_page_is_up_to_date() -> None:
    maker = page_maker("make_errors")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run `make pages`"
