"""What turns images into vectors whose angles say how alike they are: a protocol, and CLIP or DINOv2 behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.common.library_call import read_first_line
from sfumato.errors import UserError
from sfumato.sampling.image_vectors import open_vision_model

BATCH = 16  # images at once


class ImageEncoder(Protocol):
    """Any network that sees what an image shows."""

    @property
    def name(self) -> str:
        """For the page."""
        ...

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32 on the CPU, each row of length 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class TransformersEncoder:
    """A vision model of transformers with its image processor."""

    name: str
    model: Any
    processor: Any

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32 on the CPU, each row of length 1: CLIP's projected vector, else the pooled one."""
        rows: list[Tensor] = []
        for start in range(0, len(images), BATCH):
            batch = [image.convert("RGB") for image in images[start : start + BATCH]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.model.device)
            if "vision_config" in self.model.config.to_dict():  # a model of images and texts
                found = self.model.get_image_features(**inputs)
            else:
                found = self.model(**inputs)
            vectors = found if isinstance(found, Tensor) else found.pooler_output  # before version 5 a tensor
            rows.append(F.normalize(vectors.float(), dim=1).cpu())
        return torch.cat(rows)


def load_image_encoder(name: str, device: torch.device) -> TransformersEncoder:
    """name: a folder, or OWNER/NAME on the hub. Reads safetensors alone, and runs no code that comes with a model."""
    from transformers import AutoModel

    model, processor = open_vision_model(name, AutoModel, option="image_encoder")
    encoder = TransformersEncoder(name=Path(name).name, model=model.to(device), processor=processor)
    check_encoder(encoder)
    return encoder


def check_encoder(encoder: ImageEncoder) -> None:
    """UserError where a model gives no vectors of images, e.g. since it is one of texts."""
    try:
        encoder.encode([Image.new("RGB", (64, 64))])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--image_encoder: {encoder.name} gives no vector of an image ({read_first_line(error)})",
            code="image-encoder-without-vectors",
            fix="give CLIP or DINOv2",
        ) from error
