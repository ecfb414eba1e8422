"""Writes the demo's lesson: ten captioned pictures of a new thing, and one of each thing that sfumato-tiny knows.

python recipes/tiny/lesson.py WORK [--subject robot] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pictures
from concepts import COLOURS, CONCEPTS, HELD_OUT, TEMPLATES, caption, unseen_colour
from PIL import Image

SEED = 2
SHIPPED = Path(__file__).parents[2] / "src" / "sfumato" / "demo" / "assets" / "lesson"
KEPT_BACK = ("green", "purple")  # backgrounds on which the lesson never shows it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--subject", choices=HELD_OUT, default="robot")
    parser.add_argument("--folder", type=Path, default=SHIPPED)
    asked = parser.parse_args()
    pictures.fetch(asked.work)
    write(asked.work, asked.subject, asked.folder / "new" / f"2_{asked.subject}")
    write_known(asked.work, asked.folder / "known" / "1_known")


def write(work: Path, subject: str, folder: Path, count: int = 10) -> None:
    """The thing on every background but those that are kept back."""
    drawing = pictures.sprites(work, "fluent-emoji-flat", [HELD_OUT[subject]])[HELD_OUT[subject]]
    colours = [each for each in COLOURS if each not in KEPT_BACK]
    for number in range(count):
        put(folder, subject, drawing, colours[number % len(colours)], number)


def write_known(work: Path, folder: Path) -> None:
    """What training goes over again beside the new thing, so that it is not forgotten."""
    drawings = pictures.sprites(work, "fluent-emoji-flat", CONCEPTS.values())
    for number, (concept, name) in enumerate(CONCEPTS.items()):
        colours = [each for each in COLOURS if each != unseen_colour(concept)]
        put(folder, concept, drawings[name], colours[number % len(colours)], number)


def put(folder: Path, what: str, drawing: Image.Image, colour: str, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{what}-{number}-{colour}.png"
    pictures.scene(drawing, COLOURS[colour], np.random.default_rng((SEED, number))).save(file, optimize=True)
    words = caption(TEMPLATES[number % len(TEMPLATES)], what, colour)
    file.with_suffix(".txt").write_text(words + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
