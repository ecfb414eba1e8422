"""A small classifier of the drawings in images of 64 x 64 pixels, with a class for images that show none it knows.

It was trained on scenes that no diffusion model of ours was trained on, and shares no weights with any. The class
`NO_DRAWING` stands for other drawings, two drawings cut into one, blurs and noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint

SHIPPED_CLASSIFIER = Path(__file__).parent / "assets" / "classifier.safetensors"
NO_DRAWING = "nothing"
IMAGE_SIZE = 64
CLASSIFIER_CHANNELS = (24, 48, 96, 128)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the classifier sees in one image."""

    name: str  # the most probable class
    probabilities: dict[str, float]  # class -> probability


@dataclass(frozen=True)
class Classifier:
    """The network and the names of its outputs."""

    network: nn.Module
    classes: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """One prediction an image; images of another size are resized."""
        predictions = []
        for row in self.network(to_pixels(images)).softmax(1).tolist():
            probabilities = dict(zip(self.classes, row, strict=True))
            name = max(probabilities, key=probabilities.__getitem__)
            predictions.append(Prediction(name=name, probabilities=probabilities))
        return predictions


def load_classifier(path: Path = SHIPPED_CLASSIFIER) -> Classifier:
    """The shipped classifier, or another one in the same format."""
    if not path.is_file():
        raise UserError(f"{path} is missing", code="classifier-missing", fix="install sfumato again")
    file = open_checkpoint(path)
    classes = tuple(json.loads(file.header.metadata["classes"]))
    network = make_network(len(classes))
    network.load_state_dict({name: file.read(name, dtype=torch.float32) for name in file.header.tensors})
    file.close()
    return Classifier(network.eval().requires_grad_(False), classes)


def make_network(classes: int) -> nn.Sequential:
    """(B, 3, 64, 64) in [-1, 1] -> (B, classes) logits."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in CLASSIFIER_CHANNELS:
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(outputs // 8, outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * 16, classes))


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, 64, 64) in [-1, 1]."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def find_background_color(image: Image.Image) -> tuple[int, int, int]:
    """The median color of an image's border, three pixels wide."""
    pixels = np.asarray(image.convert("RGB"))
    edges = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    red, green, blue = (int(median) for median in np.median(border, axis=0))
    return red, green, blue
