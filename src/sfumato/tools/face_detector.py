"""Faces and eyes in drawings and photos, by a detector of the YOLO kind in the ONNX format.

The models that are downloaded are those of deepghs, which its package imgutils uses, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.errors import UserError
from sfumato.tools.onnx_model import download_files, open_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FACES = ("deepghs/anime_face_detection", "face_detect_v1.4_s/model.onnx")
EYES = ("deepghs/anime_eye_detection", "eye_detect_v1.0_s/model.onnx")
LONGEST, ALIGNED = 640, 32  # pixels: what images are shrunk to, and of what both sides are multiples
GRAY = 114  # of the padding, as the models were trained
MAX_OVERLAP = 0.7  # of two boxes of one thing, as a share of their union
EYE_MARGIN = 0.1  # of a face's size, around it, where eyes are looked for


class DetectedBox(NamedTuple):
    """In pixels of the image, and how sure the detector is, 0 to 1."""

    left: float
    top: float
    right: float
    bottom: float
    score: float

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def longer_side(self) -> float:
        return max(self.right - self.left, self.bottom - self.top)


@dataclass(frozen=True, kw_only=True)
class Detector:
    """size: (height, width) that the model takes, or None for any that is aligned."""

    session: InferenceSession
    size: tuple[int, int] | None

    def detect(self, image: Image.Image, min_score: float) -> list[DetectedBox]:
        """The boxes, the surest first."""
        pixels, scale = self._prepare(image)
        name = self.session.get_inputs()[0].name
        output = np.asarray(self.session.run(None, {name: pixels})[0], np.float64)[0]  # (4 + kinds, boxes)
        scores = output[4:].max(0)
        center, half = output[:2], output[2:4] / 2
        corners = np.concatenate([center - half, center + half])[:, scores >= min_score] / scale
        corners[0::2] = corners[0::2].clip(0, image.width)
        corners[1::2] = corners[1::2].clip(0, image.height)
        boxes = [DetectedBox(*map(float, box)) for box in zip(*corners, scores[scores >= min_score], strict=True)]
        return select_best(boxes)

    def _prepare(self, image: Image.Image) -> tuple[NDArray[np.float32], float]:
        """(1, 3, H, W) in [0, 1], the image at the top left; and the factor by which it was shrunk."""
        if self.size is None:
            scale = min(1.0, LONGEST / max(image.size))
            width, height = (max(1, round(side * scale)) for side in image.size)
            size = tuple(-(-side // ALIGNED) * ALIGNED for side in (height, width))
        else:
            size = self.size
            scale = min(size[1] / image.width, size[0] / image.height)
            width, height = (max(1, round(side * scale)) for side in image.size)
        pixels = np.full((*size, 3), GRAY, np.uint8)
        pixels[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        return (pixels.transpose(2, 0, 1)[None] / np.float32(255)).astype(np.float32), scale


def select_best(boxes: Sequence[DetectedBox]) -> list[DetectedBox]:
    """The surest first, without those that show the same as a surer one."""
    kept: list[DetectedBox] = []
    for box in sorted(boxes, key=lambda box: -box.score):
        if all(compute_overlap(box, other) <= MAX_OVERLAP for other in kept):
            kept.append(box)
    return kept


def compute_overlap(first: DetectedBox, second: DetectedBox) -> float:
    """The area that two boxes share over that of both together."""
    width = min(first.right, second.right) - max(first.left, second.left)
    height = min(first.bottom, second.bottom) - max(first.top, second.top)
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box.right - box.left) * (box.bottom - box.top) for box in (first, second)]
    return shared / (sum(areas) - shared) if shared else 0.0


def measure_tilt(image: Image.Image, face: DetectedBox, eyes: Detector, min_score: float) -> float:
    """By how many degrees, clockwise, the line between both eyes of a face is turned; 0 where they are not found."""
    margin = EYE_MARGIN * face.longer_side
    corner, end = (face.left - margin, face.top - margin), (face.right + margin, face.bottom + margin)
    area = (round(corner[0]), round(corner[1]), round(end[0]), round(end[1]))
    found = eyes.detect(image.crop(area), min_score)[:2]
    if len(found) < 2:
        return 0.0
    (left, top), (right, bottom) = sorted(box.center for box in found)
    return math.degrees(math.atan2(bottom - top, right - left))


def open_detector(given: Path | None, published: tuple[str, str], folder: Path, *, option: str) -> Detector:
    """given: a file of the user's; without it the published model, downloaded once into `folder`."""
    repo_id, name = published
    own = folder / repo_id.replace("/", "_")
    path = given or own / name
    if given is None and not path.is_file():
        download_files(repo_id, [name], own, advice=f"give {option} PATH")
    session = open_session(path, purpose="finding faces")
    shape, outputs = session.get_inputs()[0].shape, session.get_outputs()[0].shape
    if len(shape) != 4 or shape[1] != 3 or len(outputs) != 3:
        raise UserError(
            f"{path} is no detector: it takes no image, or gives no boxes",
            code="face-model-unsuitable",
            fix=f"give the ONNX file of a YOLO detector with {option}",
        )
    height, width = shape[2:]
    return Detector(
        session=session, size=(height, width) if isinstance(height, int) and isinstance(width, int) else None
    )
