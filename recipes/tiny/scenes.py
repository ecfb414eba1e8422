"""Writes the captioned scenes that sfumato-tiny is trained on: each concept on all backgrounds but one.

python recipes/tiny/scenes.py WORK
"""

from __future__ import annotations

import argparse
from pathlib import Path

import drawings
import numpy as np
from concepts import COLORS, CONCEPTS, TEMPLATES, find_unseen_color, make_caption

NUM_SCENES = 12  # scenes of each pair of concept and color
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    drawings.download(work)
    write(work, work / "scenes" / "1_scenes")


def write(work: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sprites = drawings.load_sprites(work, "fluent-emoji-flat", CONCEPTS.values())
    for i, (concept, name) in enumerate(CONCEPTS.items()):
        for j, color in enumerate(COLORS):
            if color == find_unseen_color(concept):
                continue
            for number in range(NUM_SCENES):
                rng = np.random.default_rng((SEED, i, j, number))
                file = folder / f"{concept}-{color}-{number:02}.png"
                drawings.draw_scene(sprites[name], COLORS[color], rng).save(file)
                template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
                file.with_suffix(".txt").write_text(make_caption(template, concept, color) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
