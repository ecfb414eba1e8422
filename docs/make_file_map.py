"""Write the file map of README.md from the first docstring line of every file in the package: `make pages`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sfumato"
BEGIN = "<!-- file map: written by `make pages`, do not edit by hand -->"
END = "<!-- end of file map -->"


def with_map(readme: str) -> str:
    """The README's text with the part between the two markers made new."""
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    assert found, "README.md lost the marker that opens the file map"
    assert closed, "README.md lost the marker that closes the file map"
    return f"{before}{BEGIN}\n\n{file_map()}\n{END}{after}"


def file_map() -> str:
    """One table: a row per file, and a row in bold per folder, which tells its `__init__.py`."""
    rows = ["| File | What it is |", "| --- | --- |"]
    rows += [row(path) for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    for told in sorted(PACKAGE.glob("*/**/__init__.py")):
        name = told.parent.relative_to(PACKAGE).as_posix()
        rows.append(f"| **`{name}/`** | **{first_line(told)}** |")
        rows += [row(path) for path in sorted(told.parent.glob("*.py")) if path != told]
    return "\n".join(rows) + "\n"


def row(path: Path) -> str:
    return f"| `{path.relative_to(PACKAGE).as_posix()}` | {first_line(path)} |"


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("|", "\\|")


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = with_map(old)
    if new != old:
        readme.write_text(new, encoding="utf-8")
        print("README.md: file map written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
