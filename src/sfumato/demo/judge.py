"""The judge: a small classifier that says what a picture of 64 x 64 pixels shows, or that it shows nothing it knows.

It was trained on scenes that no diffusion model of ours was trained on, and shares no weights with any. Among its
classes is `NOTHING`: other drawings, two drawings cut into one, blurs and noise.
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

SHIPPED = Path(__file__).parent / "assets" / "judge.safetensors"
NOTHING = "nothing"
SIZE = 64
WIDTHS = (24, 48, 96, 128)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge makes of one picture."""

    name: str  # the likeliest class
    chances: dict[str, float]  # class -> probability

    def chance(self, name: str) -> float:
        return self.chances[name]


@dataclass(frozen=True)
class Judge:
    network: nn.Module
    classes: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[Verdict]:
        """One verdict a picture; pictures of another size are resized."""
        chances = self.network(pixels_of(pictures)).softmax(1).tolist()
        found = [dict(zip(self.classes, row, strict=True)) for row in chances]
        return [Verdict(name=max(each, key=each.__getitem__), chances=each) for each in found]


def load_judge(path: Path = SHIPPED) -> Judge:
    """The judge that is shipped, or another one in the same format."""
    if not path.is_file():
        raise UserError(f"{path} is missing", fix="install sfumato again")
    file = open_checkpoint(path)
    classes = tuple(json.loads(file.header.metadata["classes"]))
    network = new_network(len(classes))
    network.load_state_dict({name: file.read(name, dtype=torch.float32) for name in file.header.tensors})
    file.close()
    return Judge(network.eval().requires_grad_(False), classes)


def new_network(classes: int) -> nn.Sequential:
    """(B, 3, 64, 64) in [-1, 1] -> (B, classes) logits."""
    layers: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(width // 8, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 16, classes))


def pixels_of(pictures: Sequence[Image.Image]) -> Tensor:
    """(B, 3, 64, 64) in [-1, 1]."""
    fitted = [each.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for each in pictures]
    return torch.from_numpy(np.stack([np.asarray(each) for each in fitted])).permute(0, 3, 1, 2) / 127.5 - 1


def background_of(picture: Image.Image) -> tuple[int, int, int]:
    """The median colour of a picture's rim, three pixels wide."""
    pixels = np.asarray(picture.convert("RGB"))
    rim = np.concatenate([each.reshape(-1, 3) for each in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])])
    red, green, blue = (int(each) for each in np.median(rim, axis=0))
    return red, green, blue
