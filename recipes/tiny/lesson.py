"""Writes the demo's lesson: ten images with captions of a new thing, and one of each thing that sfumato-tiny knows.

python recipes/tiny/lesson.py WORK [--subject robot] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import drawings
import numpy as np
from concepts import COLORS, CONCEPTS, NEW_CONCEPTS, TEMPLATES, find_unseen_color, make_caption
from PIL import Image

SEED = 2
SHIPPED = Path(__file__).parents[2] / "src" / "sfumato" / "demo" / "assets" / "lesson"
UNUSED_COLORS = ("green", "purple")  # backgrounds on which the lesson never shows it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--subject", choices=NEW_CONCEPTS, default="robot")
    parser.add_argument("--folder", type=Path, default=SHIPPED)
    asked = parser.parse_args()
    drawings.download(asked.work)
    write(asked.work, asked.subject, asked.folder / "new" / f"2_{asked.subject}")
    write_known(asked.work, asked.folder / "known" / "1_known")


def write(work: Path, subject: str, folder: Path, count: int = 10) -> None:
    """The thing on every background but the unused ones."""
    sprite = drawings.load_sprites(work, "fluent-emoji-flat", [NEW_CONCEPTS[subject]])[NEW_CONCEPTS[subject]]
    colors = [color for color in COLORS if color not in UNUSED_COLORS]
    for number in range(count):
        write_image(folder, subject, sprite, colors[number % len(colors)], number)


def write_known(work: Path, folder: Path) -> None:
    """The known things, which training repeats beside the new one so that they are not forgotten."""
    sprites = drawings.load_sprites(work, "fluent-emoji-flat", CONCEPTS.values())
    for number, (concept, name) in enumerate(CONCEPTS.items()):
        colors = [color for color in COLORS if color != find_unseen_color(concept)]
        write_image(folder, concept, sprites[name], colors[number % len(colors)], number)


def write_image(folder: Path, what: str, sprite: Image.Image, color: str, number: int) -> None:
    """One image and its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{what}-{number}-{color}.png"
    drawings.draw_scene(sprite, COLORS[color], np.random.default_rng((SEED, number))).save(file, optimize=True)
    words = make_caption(TEMPLATES[number % len(TEMPLATES)], what, color)
    file.with_suffix(".txt").write_text(words + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
