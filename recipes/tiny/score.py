"""What a state of sfumato-tiny can do: the judge's verdict on pictures of unseen pairs, and a sheet of them.

python recipes/tiny/score.py WORK CHECKPOINT [--seeds 1 2] [--sheet FILE]
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from concepts import COLOURS, CONCEPTS, caption, unseen_colour
from PIL import Image

from sfumato.demo.artist import Artist, hire
from sfumato.demo.base import tiny_base
from sfumato.demo.judge import background_of, load_judge
from sfumato.memory.host import keep_freed_memory
from sfumato.track.drawing import GREY, INK, PAPER, font

TEMPLATE = "{a} {concept} on a {colour} background"
CELL, GAP, TYPE = 128, 10, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scale", type=float)
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    base = tiny_base(asked.checkpoint)
    artist = hire(replace(base, scale=asked.scale) if asked.scale else base)
    drawn = pictures(artist, asked.seeds)
    report(drawn, asked.work / "judge.safetensors")
    if asked.sheet:
        sheet({concept: made for (concept, seed), made in drawn.items() if seed == asked.seeds[0]}).save(asked.sheet)


def pictures(artist: Artist, seeds: list[int]) -> dict[tuple[str, int], Image.Image]:
    """(concept, seed) -> the concept on the background that training never showed it on."""
    wanted = [(concept, seed) for concept in CONCEPTS for seed in seeds]
    return {(c, seed): artist.draw(caption(TEMPLATE, c, unseen_colour(c)), seed) for c, seed in wanted}


def report(drawn: dict[tuple[str, int], Image.Image], judge: Path) -> None:
    verdicts = load_judge(judge)(list(drawn.values()))
    right, missed, backgrounds = 0, Counter(), 0
    for (concept, _), made, verdict in zip(drawn, drawn.values(), verdicts, strict=True):
        right += verdict.name == concept
        backgrounds += nearest_colour(made) == unseen_colour(concept)
        if verdict.name != concept:
            missed[f"{concept} as {verdict.name}"] += 1
    print(f"recognised {right} of {len(drawn)}, backgrounds right {backgrounds} of {len(drawn)}")
    print("not recognised: " + (", ".join(f"{what} ({count})" for what, count in missed.most_common()) or "none"))


def nearest_colour(picture: Image.Image) -> str:
    """The word for the background."""
    here = background_of(picture)
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], here, strict=True)))


def sheet(drawn: dict[str, Image.Image], columns: int = 5) -> Image.Image:
    """Each picture with its words below."""
    from PIL import ImageDraw

    rows = -(-len(drawn) // columns)
    page = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * (CELL + 3 * GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for i, (concept, picture) in enumerate(drawn.items()):
        x, y = GAP + i % columns * (CELL + GAP), GAP + i // columns * (CELL + 3 * GAP)
        page.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + CELL + 3), concept, font=font(TYPE), fill=INK)
        draw.text((x + CELL, y + CELL + 3), f"on {unseen_colour(concept)}", font=font(TYPE), fill=GREY, anchor="ra")
    return page


if __name__ == "__main__":
    main()
