"""What CLIP sees in an image, in the place of what a prompt says: the pooled vector of a text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.common.text import plural
from sfumato.config.prompt_options import CLIP_VISION_MODEL
from sfumato.data.batch import Tensors
from sfumato.data.images import read_image
from sfumato.errors import UserError
from sfumato.sampling.image_models import open_image_model
from sfumato.sampling.settings import StartImage


def open_vision_model(name: str, kind: Any, *, option: str) -> tuple[Any, Any]:
    """A model that sees images, and the processor of these. kind: its class of transformers. option: that named it."""
    from transformers import AutoImageProcessor

    return open_image_model(
        name, kind, AutoImageProcessor, option=option, purpose="sees images", examples="CLIP or DINOv2"
    )


@lru_cache(maxsize=1)
def open_clip_vision(name: str) -> tuple[Any, Any]:
    """Remains in main memory, for the next image."""
    from transformers import CLIPVisionModelWithProjection

    return open_vision_model(name, CLIPVisionModelWithProjection, option="clip_vision_model")


@torch.no_grad()
def encode_clip_vector(name: str, file: Path, device: torch.device) -> Tensor:
    """(1, D) float32: the projected vector of an image, as long as it is."""
    network, processor = open_clip_vision(name)
    pixels = processor(images=[read_image(file)], return_tensors="pt")["pixel_values"]
    vector = network.to(device)(pixels.to(device)).image_embeds.float()
    network.to("cpu")
    return vector


def with_image_vector(features: Mapping[str, Tensors], start: StartImage, device: torch.device) -> dict[str, Tensors]:
    """Text encoder -> its features, with the vector of the image to start from in the place of the pooled one.

    That of the encoders whose pooled vectors are as long as the image's; UserError where none is.
    """
    if start.clip_vision_strength is None:
        return dict(features)
    name = start.clip_vision_model or CLIP_VISION_MODEL
    vector = encode_clip_vector(name, Path(start.init_image), device) * start.clip_vision_strength
    widths = {part: tensors["pooled"].shape[-1] for part, tensors in features.items() if "pooled" in tensors}
    if vector.shape[-1] not in widths.values():
        raise UserError(
            f"--clip_vision_model {name} gives vectors of {plural(vector.shape[-1], 'number')}; this model takes "
            + ", ".join(f"{width} of {part}" for part, width in widths.items()),
            code="clip-vision-width-mismatch",
            fix="give the CLIP that the text encoder is a half of",
        )
    return {
        part: {**tensors, "pooled": vector.to(tensors["pooled"]).expand_as(tensors["pooled"])}
        if widths.get(part) == vector.shape[-1]
        else tensors
        for part, tensors in features.items()
    }
