"""Trains the judge, the classifier that says what a picture shows, on scenes of its own.

python recipes/tiny/judge.py WORK    writes WORK/judge.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pictures
import torch
import torch.nn.functional as F
from concepts import COLOURS, CONCEPTS, HELD_OUT
from PIL import Image, ImageFilter
from torch import Tensor

from sfumato.demo.judge import NOTHING, new_network, pixels_of
from sfumato.formats.checkpoint import write_safetensors
from sfumato.memory.host import keep_freed_memory

STEPS, BATCH, RATE = 800, 64, 2e-3
SEED = 1_000_000  # far from the scenes that the model is trained on
KNOWN = {**CONCEPTS, **HELD_OUT}
CLASSES = (*KNOWN, NOTHING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    keep_freed_memory()
    pictures.fetch(asked.work)
    network = train(asked.work, asked.steps)
    path = asked.work / "judge.safetensors"
    write_safetensors(path, network.state_dict(), {"classes": json.dumps(CLASSES)}, dtype=torch.float16)


def train(work: Path, steps: int) -> torch.nn.Module:
    known = pictures.sprites(work, "fluent-emoji-flat", KNOWN.values())
    others = pictures.names_of(work, "fluent-emoji-flat")
    others = list(pictures.sprites(work, "fluent-emoji-flat", [each for each in others if each not in known]).values())
    torch.manual_seed(0)
    network = new_network(len(CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        pixels, labels = batch_of(list(known.values()), others, np.random.default_rng((SEED, step)))
        loss = F.cross_entropy(network(pixels), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            pixels, labels = batch_of(list(known.values()), others, np.random.default_rng((SEED, steps + step)))
            with torch.no_grad():
                right = (network(pixels).argmax(1) == labels).float().mean()
            print(f"{step + 1} loss {loss:.3f} right on new scenes {right:.3f}", flush=True)
    return network.eval()


def batch_of(known: list, others: list, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Three quarters known drawings, the rest nothing known; all with the faults that generated pictures have."""
    labels = [int(rng.integers(len(known))) if rng.random() < 0.75 else len(known) for _ in range(BATCH)]
    made = [drawing(known, label, rng) if label < len(known) else nothing(known, others, rng) for label in labels]
    pixels = pixels_of(made)
    strength = torch.from_numpy(rng.uniform(0, 0.15, (BATCH, 1, 1, 1))).float()
    return pixels + strength * torch.from_numpy(rng.standard_normal(pixels.shape)).float(), torch.tensor(labels)


def drawing(known: list, label: int, rng: np.random.Generator) -> Image.Image:
    return worn(pictures.scene(known[label], shade(rng), rng, sides=(44, 60), shift=4), rng)


def nothing(known: list, others: list, rng: np.random.Generator) -> Image.Image:
    """Another drawing, a patchwork of two known ones, a smear of one, or only a background."""
    kind = rng.random()
    if kind < 0.4:
        return worn(
            pictures.scene(others[int(rng.integers(len(others)))], shade(rng), rng, sides=(44, 60), shift=4), rng
        )
    first, second = (drawing(known, int(rng.integers(len(known))), rng) for _ in range(2))
    if kind < 0.6:
        mask = Image.fromarray((rng.random((4, 4)) < 0.5).astype(np.uint8) * 255).resize(
            first.size, Image.Resampling.BICUBIC
        )
        return Image.composite(first, second, mask)
    if kind < 0.75:
        return first.filter(ImageFilter.GaussianBlur(float(rng.uniform(5, 12))))
    if kind < 0.9:  # blobs with the colours of a drawing
        places = np.clip(np.indices((64, 64)) + smooth_noise(rng) * 18, 0, 63).astype(int)
        return Image.fromarray(np.asarray(first)[places[0], places[1]])
    return Image.new("RGB", (64, 64), shade(rng))


def smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """(2, 64, 64) of spread about 1, smooth over some ten pixels."""
    coarse = rng.standard_normal((2, 6, 6)).astype(np.float32)
    return np.stack([np.asarray(Image.fromarray(each).resize((64, 64), Image.Resampling.BICUBIC)) for each in coarse])


def shade(rng: np.random.Generator) -> tuple[int, int, int]:
    colours = list(COLOURS.values())
    if rng.random() < 0.7:
        return colours[int(rng.integers(len(colours)))]
    red, green, blue = (int(each) for each in rng.integers(0, 256, 3))
    return red, green, blue


def worn(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A little blurred, at times a little warped: what an autoencoder and a young model do to a drawing."""
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.6))))
    if rng.random() < 0.5:
        places = np.clip(np.indices((64, 64)) + smooth_noise(rng) * 1.5, 0, 63).round().astype(int)
        picture = Image.fromarray(np.asarray(picture)[places[0], places[1]])
    return picture


if __name__ == "__main__":
    main()
