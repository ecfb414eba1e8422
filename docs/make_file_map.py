"""Write docs/files.md, every file of the package with the first line of its docstring: `make pages`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sfumato"
PAGE = ROOT / "docs" / "files.md"
HEAD = """# Files

Every file of `src/sfumato` with the first line of its docstring; a folder's row is in bold.

| File | What it is |
| --- | --- |
"""


def page() -> str:
    """The page: a row per file, and a row in bold per folder with the docstring of its `__init__.py`."""
    rows = [make_row(path) for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    for init in sorted(PACKAGE.glob("*/**/__init__.py")):
        name = init.parent.relative_to(PACKAGE).as_posix()
        rows.append(f"| **`{name}/`** | **{read_first_line(init)}** |\n")
        rows += [make_row(path) for path in sorted(init.parent.glob("*.py")) if path != init]
    return HEAD + "".join(rows)


def make_row(path: Path) -> str:
    return f"| `{path.relative_to(PACKAGE).as_posix()}` | {read_first_line(path)} |\n"


def read_first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("|", "\\|")


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
