"""Write docs/methods.md: what can be trained, for which families: `make pages`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
sys.path[:0] = [str(ROOT / "tests")]
from methods.test_every_method import FAMILIES, NOES, OPTIONS  # pyright: ignore[reportMissingImports]

TITLES = {
    "sd": "Stable Diffusion 1 and 2",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3 and 3.5",
    "flux": "FLUX.1",
    "flux_kontext": "FLUX.1 Kontext",
    "chroma": "Chroma",
    "lumina": "Lumina-Image 2.0",
}
METHODS = {
    "adapter": ("Adapters (LoRA and others)", "[adapters.md](adapters.md)"),
    "full": ("The whole model", "[fine_tune.md](fine_tune.md)"),
    "textual_inversion": ("New words (textual inversion)", "[train_textual_inversion.md](train_textual_inversion.md)"),
    "control_net": ("ControlNet", "[control.md](control.md)"),
    "lllite": ("ControlNet-LLLite", "[control.md](control.md)"),
    "leco": ("Concepts and sliders (LECO)", "[concepts.md](concepts.md)"),
    "inpainting": ("Inpainting models", "[train_textual_inversion.md](train_textual_inversion.md#inpainting)"),
}
HEAD = """# What can be trained

Each yes is a variant of the test in `tests/methods/test_every_method.py`: two steps change all that trains and, bit for
bit, nothing else, and the file is whole; a whole model's file has exactly the names, shapes and dtypes of its original.
The other tests of `tests/methods` and `tests/families` train each method longer, resume it bitwise, and compare what it
saves with diffusers.

"""
TAIL = """
FLUX.1 covers dev, schnell and what is made from them; its model for inpainting is FLUX.1 Fill. Inpainting models are
trained as adapters, whole, or with new words. U-Nets have both versions of LLLite, the other models the second.
"""


def page() -> str:
    lines = ["| | " + " | ".join(TITLES[family] for family in FAMILIES) + " |\n", "| --- |" + " --- |" * len(FAMILIES)]
    rows = [lines[0], lines[1] + "\n"]
    for method in OPTIONS:
        title, link = METHODS[method]
        cells = [describe_cell(method, family) for family in FAMILIES]
        rows.append(f"| {title}: {link} | " + " | ".join(cells) + " |\n")
    return HEAD + "".join(rows) + TAIL


def describe_cell(method: str, family: str) -> str:
    if (method, family) in NOES:
        return f"no: {NOES[method, family][1]}"
    return f"yes (`{method}-{family}`)"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
