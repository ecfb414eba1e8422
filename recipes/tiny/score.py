"""Scores a checkpoint of sfumato-tiny: the classifier's predictions on images of unseen pairs, and a sheet of them.

python recipes/tiny/score.py WORK CHECKPOINT [--seeds 1 2] [--sheet FILE]
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from concepts import COLORS, CONCEPTS, find_unseen_color, make_caption
from PIL import Image

from sfumato.demo.base import tiny_base
from sfumato.demo.classifier import find_background_color, load_classifier
from sfumato.demo.pipeline import DemoPipeline, load_pipeline
from sfumato.memory.host import keep_freed_memory
from sfumato.track.charts.png import GREY, INK, PAPER, font

TEMPLATE = "{a} {concept} on a {color} background"
CELL, GAP, FONT_SIZE = 128, 10, 12


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
    pipeline = load_pipeline(replace(base, scale=asked.scale) if asked.scale else base)
    images = make_images(pipeline, asked.seeds)
    print_scores(images, asked.work / "classifier.safetensors")
    if asked.sheet:
        first = {concept: image for (concept, seed), image in images.items() if seed == asked.seeds[0]}
        draw_sheet(first).save(asked.sheet)


def make_images(pipeline: DemoPipeline, seeds: list[int]) -> dict[tuple[str, int], Image.Image]:
    """(concept, seed) -> the concept on the background that training never showed it on."""
    images = {}
    for concept in CONCEPTS:
        prompt = make_caption(TEMPLATE, concept, find_unseen_color(concept))
        for seed in seeds:
            images[concept, seed] = pipeline.generate(prompt, seed)
    return images


def print_scores(images: dict[tuple[str, int], Image.Image], classifier: Path) -> None:
    predictions = load_classifier(classifier)(list(images.values()))
    right, missed, backgrounds = 0, Counter(), 0
    for (concept, _), image, prediction in zip(images, images.values(), predictions, strict=True):
        right += prediction.name == concept
        backgrounds += find_nearest_color(image) == find_unseen_color(concept)
        if prediction.name != concept:
            missed[f"{concept} as {prediction.name}"] += 1
    print(f"recognized {right} of {len(images)}, backgrounds right {backgrounds} of {len(images)}")
    print("not recognized: " + (", ".join(f"{what} ({count})" for what, count in missed.most_common()) or "none"))


def find_nearest_color(image: Image.Image) -> str:
    """The name of the background color that is nearest to the image's border."""
    border = find_background_color(image)
    distances = {}
    for name, color in COLORS.items():
        distances[name] = sum((a - b) ** 2 for a, b in zip(color, border, strict=True))
    return min(distances, key=distances.__getitem__)


def draw_sheet(images: dict[str, Image.Image], columns: int = 5) -> Image.Image:
    """Each image with its words below."""
    from PIL import ImageDraw

    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * (CELL + 3 * GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for i, (concept, image) in enumerate(images.items()):
        x, y = GAP + i % columns * (CELL + GAP), GAP + i // columns * (CELL + 3 * GAP)
        page.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + CELL + 3), concept, font=font(FONT_SIZE), fill=INK)
        draw.text(
            (x + CELL, y + CELL + 3), f"on {find_unseen_color(concept)}", font=font(FONT_SIZE), fill=GREY, anchor="ra"
        )
    return page


if __name__ == "__main__":
    main()
