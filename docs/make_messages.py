"""Write tests/goldens/messages.txt: every text of two words or more that the package can show, in one place for review.

Help lines, errors, notes, log lines and tables alike, file by file, read from the source: `make pages`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sfumato"
LISTING = ROOT / "tests" / "goldens" / "messages.txt"


def listing() -> str:
    """The whole file: a heading for each module, then its texts in the order of the source."""
    parts: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = list(messages(ast.parse(path.read_text(encoding="utf-8"))))
        if lines:
            parts.append(f"{path.relative_to(PACKAGE).as_posix()}\n" + "".join(f"    {line}\n" for line in lines))
    return "\n".join(parts)


def messages(tree: ast.Module) -> Iterator[str]:
    """Every text with a space between words that is no docstring; what is filled in stands in braces."""
    skipped = docstrings(tree) | inside_f_strings(tree)
    literals = [node for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr | ast.Call)]
    for node in sorted(literals, key=lambda node: (node.lineno, node.col_offset)):
        text = text_of(node) if id(node) not in skipped else None
        if text is not None and " " in text.strip() and any(word.isalpha() for word in text.split()):
            yield text.replace("\n", "\\n")


def text_of(node: ast.AST) -> str | None:
    """The text of a literal, an f-string or a number of things; None for anything else."""
    if isinstance(node, ast.Call):
        return counted(node) or None
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr):
        return None
    pieces: list[str] = []
    for value in node.values:
        if isinstance(value, ast.FormattedValue):
            pieces.append(counted(value.value) or "{" + ast.unparse(value.value) + "}")
        elif isinstance(value, ast.Constant):
            pieces.append(str(value.value))
    return "".join(pieces)


def counted(node: ast.expr) -> str:
    """What a call of `plural` gives for several; empty for any other expression."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "plural"):
        return ""
    count, one, *many = node.args
    noun = many[0] if many else one
    text = str(noun.value) if isinstance(noun, ast.Constant) else f"{{{ast.unparse(noun)}}}"
    return f"{{{ast.unparse(count)}}} {text}{'' if many else 's'}"


def docstrings(tree: ast.Module) -> set[int]:
    """The ids of all texts that stand alone as a statement."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def inside_f_strings(tree: ast.Module) -> set[int]:
    """The ids of the pieces of f-strings and of numbers of things, which are told with the whole."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found |= {id(value) for value in node.values}
            filled_in = [value.value for value in node.values if isinstance(value, ast.FormattedValue)]
            found |= {id(value) for value in filled_in if isinstance(value, ast.Call)}
        elif isinstance(node, ast.Call) and counted(node):
            found |= {id(noun) for noun in node.args[1:]}
    return found


def main() -> int:
    LISTING.write_text(listing(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
