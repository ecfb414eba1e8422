"""Write requirements.txt of pyproject.toml, for those who install by it: `make pages`."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "requirements.txt"
BY_HAND = (  # what a machine may need besides, or another build of
    ("onnxruntime-gpu", "instead of onnxruntime, to tag images on a GPU"),
    ("onnx", "for models of taggers that are to be looked into"),
    ("xformers", "torch's own attention needs no more memory; for other programs in this environment"),
)


def make_requirements() -> str:
    """The file: what every run needs, extras, and as comments what is installed by hand."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = ["# Made of pyproject.toml by docs/make_requirements.py. torch: name the build for your GPU first.", ""]
    lines += project["dependencies"]
    for extra, packages in project["optional-dependencies"].items():
        if extra not in ("test", "recipe"):
            lines += [
                "",
                f"# extra {extra}",
                *(package if extra == "optimizers" else f"# {package}" for package in packages),
            ]
    lines += ["", "# by hand", *(f"# {name}  # {why}" for name, why in BY_HAND)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    TARGET.write_text(make_requirements(), encoding="utf-8")
