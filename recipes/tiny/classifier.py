"""Trains the classifier of drawings on scenes of its own.

python recipes/tiny/classifier.py WORK    writes WORK/classifier.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import drawings
import numpy as np
import torch
import torch.nn.functional as F
from concepts import COLORS, CONCEPTS, NEW_CONCEPTS
from PIL import Image, ImageFilter
from torch import Tensor

from sfumato.demo.classifier import NO_DRAWING, make_network, to_pixels
from sfumato.formats.checkpoint_writer import write_safetensors
from sfumato.memory.host import keep_freed_memory

STEPS, BATCH, LEARNING_RATE = 800, 64, 2e-3
SEED = 1_000_000  # far from the scenes that the model is trained on
KNOWN = {**CONCEPTS, **NEW_CONCEPTS}
CLASSES = (*KNOWN, NO_DRAWING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    keep_freed_memory()
    drawings.download(asked.work)
    network = train(asked.work, asked.steps)
    path = asked.work / "classifier.safetensors"
    write_safetensors(path, network.state_dict(), {"classes": json.dumps(CLASSES)}, dtype=torch.float16)


def train(work: Path, steps: int) -> torch.nn.Module:
    known = drawings.load_sprites(work, "fluent-emoji-flat", KNOWN.values())
    names = [name for name in drawings.list_names(work, "fluent-emoji-flat") if name not in known]
    others = list(drawings.load_sprites(work, "fluent-emoji-flat", names).values())
    torch.manual_seed(0)
    network = make_network(len(CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        pixels, labels = make_batch(list(known.values()), others, np.random.default_rng((SEED, step)))
        loss = F.cross_entropy(network(pixels), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            pixels, labels = make_batch(list(known.values()), others, np.random.default_rng((SEED, steps + step)))
            with torch.no_grad():
                right = (network(pixels).argmax(1) == labels).float().mean()
            print(f"{step + 1} loss {loss:.3f} right on new scenes {right:.3f}", flush=True)
    return network.eval()


def make_batch(known: list, others: list, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Three quarters known drawings, the rest nothing known; all with the faults that generated images have."""
    labels = [int(rng.integers(len(known))) if rng.random() < 0.75 else len(known) for _ in range(BATCH)]
    images = []
    for label in labels:
        known_label = label < len(known)
        images.append(draw_known(known, label, rng) if known_label else draw_unknown(known, others, rng))
    pixels = to_pixels(images)
    strength = torch.from_numpy(rng.uniform(0, 0.15, (BATCH, 1, 1, 1))).float()
    return pixels + strength * torch.from_numpy(rng.standard_normal(pixels.shape)).float(), torch.tensor(labels)


def draw_known(known: list, label: int, rng: np.random.Generator) -> Image.Image:
    """A known drawing on any background, degraded."""
    return degrade(drawings.draw_scene(known[label], draw_color(rng), rng, sides=(44, 60), shift=4), rng)


def draw_unknown(known: list, others: list, rng: np.random.Generator) -> Image.Image:
    """Another drawing, a patchwork of two known ones, a smear of one, or only a background."""
    kind = rng.random()
    if kind < 0.4:
        sprite = others[int(rng.integers(len(others)))]
        return degrade(drawings.draw_scene(sprite, draw_color(rng), rng, sides=(44, 60), shift=4), rng)
    first, second = (draw_known(known, int(rng.integers(len(known))), rng) for _ in range(2))
    if kind < 0.6:
        mask = Image.fromarray((rng.random((4, 4)) < 0.5).astype(np.uint8) * 255)
        return Image.composite(first, second, mask.resize(first.size, Image.Resampling.BICUBIC))
    if kind < 0.75:
        return first.filter(ImageFilter.GaussianBlur(float(rng.uniform(5, 12))))
    if kind < 0.9:  # blobs with the colors of a drawing
        places = np.clip(np.indices((64, 64)) + make_smooth_noise(rng) * 18, 0, 63).astype(int)
        return Image.fromarray(np.asarray(first)[places[0], places[1]])
    return Image.new("RGB", (64, 64), draw_color(rng))


def make_smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """(2, 64, 64) of standard deviation about 1, smooth over some ten pixels."""
    coarse = rng.standard_normal((2, 6, 6)).astype(np.float32)
    planes = [Image.fromarray(plane).resize((64, 64), Image.Resampling.BICUBIC) for plane in coarse]
    return np.stack([np.asarray(plane) for plane in planes])


def draw_color(rng: np.random.Generator) -> tuple[int, int, int]:
    colors = list(COLORS.values())
    if rng.random() < 0.7:
        return colors[int(rng.integers(len(colors)))]
    red, green, blue = (int(channel) for channel in rng.integers(0, 256, 3))
    return red, green, blue


def degrade(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A little blurred, at times a little warped: what an autoencoder and a young model do to a drawing."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.6))))
    if rng.random() < 0.5:
        places = np.clip(np.indices((64, 64)) + make_smooth_noise(rng) * 1.5, 0, 63).round().astype(int)
        image = Image.fromarray(np.asarray(image)[places[0], places[1]])
    return image


if __name__ == "__main__":
    main()
