"""Write docs/errors.md: every error that a user can meet, by its code, with its cause and its fix: `make pages`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from make_messages import text_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sfumato"
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# Errors

Every error ends the program with exit code 2 and one last line: what is wrong, where, and the line that fixes it. Each
has a code, which does not change when its words do; this page lists them all. What is filled in stands in braces. With
`--debug` a traceback comes before the last line. An *internal error* is none of these: it is a fault of the program.

| code | what is wrong | how to fix it |
| --- | --- | --- |
"""


class Entry(NamedTuple):
    """One place in the source that makes a UserError."""

    code: str  # empty where it is no literal
    what: str
    fix: str
    place: str  # file:line


def page() -> str:
    """The whole page, sorted by code."""
    found = {entry.code: entry for entry in entries()}
    rows = [f"| `{each.code}` | {cell(each.what)} | {cell(each.fix)} |\n" for _, each in sorted(found.items())]
    return HEAD + "".join(rows)


def entries() -> Iterator[Entry]:
    """Every call with the keyword `code` in the package: UserError, Problems.add, a row of rules."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (entry := entry_of(node, f"{path.relative_to(PACKAGE)}:{node.lineno}")):
                yield entry


def entry_of(node: ast.Call, place: str) -> Entry | None:
    """What a call says; None where it has no `code`, or hands on the one that it was given."""
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if "code" not in given or isinstance(given["code"], ast.Name | ast.Attribute | ast.Subscript):
        return None
    severity = given.get("severity")
    if isinstance(severity, ast.Constant) and severity.value == "note":  # a rule that is never an error
        return None
    what = given["what"] if "what" in given else node.args[0] if node.args else None
    return Entry(words(given["code"]), words(what), words(given.get("fix")), place)


def words(node: ast.expr | None) -> str:
    """The text of an expression; of several pieces or alternatives each, what is computed in braces."""
    if node is None:
        return ""
    text = text_of(node)
    if text is not None:
        return text
    if isinstance(node, ast.IfExp):
        return " / ".join(filter(None, (words(node.body), words(node.orelse))))
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "{" + ast.unparse(node) + "}"


def cell(text: str) -> str:
    """A text inside a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
