"""Print the lowest versions that pyproject.toml allows, as pip takes them; torch excepted."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def main() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    for line in project["dependencies"]:
        name, lowest = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()  # type: ignore[union-attr]
        if name != "torch":
            print(f"{name}=={lowest}")


if __name__ == "__main__":
    main()
