"""Writes the captioned scenes that sfumato-tiny is trained on: each concept on all backgrounds but one.

python recipes/tiny/scenes.py WORK
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pictures
from concepts import COLOURS, CONCEPTS, TEMPLATES, caption, unseen_colour

COUNT = 12  # scenes of each pair of concept and colour
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    pictures.fetch(work)
    write(work, work / "scenes" / "1_scenes")


def write(work: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drawings = pictures.sprites(work, "fluent-emoji-flat", CONCEPTS.values())
    for i, (concept, name) in enumerate(CONCEPTS.items()):
        for j, colour in enumerate(COLOURS):
            if colour == unseen_colour(concept):
                continue
            for number in range(COUNT):
                rng = np.random.default_rng((SEED, i, j, number))
                file = folder / f"{concept}-{colour}-{number:02}.png"
                pictures.scene(drawings[name], COLOURS[colour], rng).save(file)
                template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
                file.with_suffix(".txt").write_text(caption(template, concept, colour) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
