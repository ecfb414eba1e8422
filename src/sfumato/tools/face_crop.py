"""Crops around faces, named after the face's place in them, as --face_crop_aug_range reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sfumato.common.files import check_writable, write_atomically
from sfumato.common.text import list_some
from sfumato.data.augment import Face
from sfumato.data.buckets import Size
from sfumato.errors import UserError
from sfumato.tools.face_detector import DetectedBox, Detector, measure_tilt
from sfumato.tools.image_batches import UniqueNames, iterate_images, list_image_paths, report_unreadable
from sfumato.track.progress_task import ProgressTask

DRAWN = (255, 0, 255)  # the frame of --debug


@dataclass(frozen=True, kw_only=True)
class FaceImage:
    """An image and the face in it."""

    image: Image.Image
    face: Face


@dataclass(frozen=True, kw_only=True)
class FaceCrop:
    """size, or ratio of a face's longer side: width and height of the crop; without both the whole image is kept.

    fit: shrink the image so that the crop just covers it. face_size: resize the image so that the face has this size.
    min_size, max_size: of faces that are taken, the second one excluded. eyes: turn faces upright by them.
    """

    faces: Detector
    min_score: float
    eyes: Detector | None = None
    size: Size | None = None
    ratio: tuple[float, float] | None = None
    fit: bool = False
    face_size: int | None = None
    min_size: int | None = None
    max_size: int | None = None
    multiple: bool = False
    framed: bool = False

    def run(self, source: Path, target: Path) -> tuple[int, int]:
        """Write the crops of a folder's images; gives how many, and how many images could not be read."""
        if source.resolve() == target.resolve():
            raise UserError(
                f"the crops would lie among the images of {source}",
                code="faces-into-source",
                fix="give another --dst_dir",
            )
        images = list_image_paths(source, recursive=False)
        check_writable(target, option="--dst_dir")
        target.mkdir(parents=True, exist_ok=True)
        count, faults, without, names = 0, list[str](), list[str](), UniqueNames()
        with ProgressTask("finding faces", "images") as progress:
            for path, image in iterate_images(images, faults, progress):
                written = self._write_crops(image, names.choose(path), target)
                count += written
                without += [] if written else [path.name]
        report_unreadable(faults, "no faces")
        if without:
            report_unreadable([list_some(without)], "no face was found in")
        return count, len(faults)

    def _write_crops(self, image: Image.Image, stem: str, target: Path) -> int:
        found = [box for box in self.faces.detect(image, self.min_score) if self._is_wanted(box)]
        found.sort(key=lambda box: -box.longer_side)
        for number, box in enumerate(found if self.multiple else found[:1], 1):
            crop = self.crop(image, box)
            name = f"{stem}{f'_{number:02d}' if self.multiple else ''}_" + "_".join(
                f"{value:04d}" for value in crop.face
            )
            with write_atomically(target / f"{name}.png") as temporary:
                (draw_frame(crop) if self.framed else crop.image).save(temporary, "PNG")
        return len(found) if self.multiple else min(1, len(found))

    def _is_wanted(self, box: DetectedBox) -> bool:
        side = int(box.longer_side)
        return side >= (self.min_size or 0) and (self.max_size is None or side < self.max_size)

    def crop(self, image: Image.Image, box: DetectedBox) -> FaceImage:
        x, y = box.center
        face = Face(int(x), int(y), int(box.right - box.left), int(box.bottom - box.top))
        if self.eyes is not None:
            image = rotate_mirrored(image, measure_tilt(image, box, self.eyes, self.min_score), (face.x, face.y))
        whole = FaceImage(image=image, face=face)
        size = self._choose_size(face)
        return whole if size is None else crop_around(resize(whole, self._choose_scale(whole, size)), size)

    def _choose_size(self, face: Face) -> Size | None:
        if self.ratio is None:
            return self.size
        side = max(face.width, face.height)
        return max(1, int(side * self.ratio[0] + 0.5)), max(1, int(side * self.ratio[1] + 0.5))

    def _choose_scale(self, whole: FaceImage, size: Size) -> float:
        """The factor by which the image is resized before the crop, which then fits into it."""
        if self.ratio is not None:
            return 1.0
        cover = max(size[0] / whole.image.width, size[1] / whole.image.height)
        if self.fit:
            return cover
        wanted = self.face_size / max(whole.face.width, whole.face.height, 1) if self.face_size else 1.0
        return max(wanted, cover)


def resize(whole: FaceImage, scale: float) -> FaceImage:
    if scale == 1:
        return whole
    size = tuple(max(1, int(side * scale + 0.5)) for side in whole.image.size)
    kernel = Image.Resampling.BOX if scale < 1 else Image.Resampling.LANCZOS
    face = Face(*(int(value * scale + 0.5) for value in whole.face))
    return FaceImage(image=whole.image.resize((size[0], size[1]), kernel), face=face)


def crop_around(whole: FaceImage, size: Size) -> FaceImage:
    """A crop with the face in the middle, or as near to it as the image's borders allow."""
    image, face = whole.image, whole.face
    width, height = min(size[0], image.width), min(size[1], image.height)
    left = max(0, min(face.x - width // 2, image.width - width))
    top = max(0, min(face.y - height // 2, image.height - height))
    moved = face._replace(x=face.x - left, y=face.y - top)
    return replace(whole, image=image.crop((left, top, left + width, top + height)), face=moved)


def rotate_mirrored(image: Image.Image, degrees: float, center: tuple[int, int]) -> Image.Image:
    """Counterclockwise around a point, at the same size; what comes in from outside is the image mirrored."""
    if not degrees:
        return image
    margin = min(image.size) // 2
    padded = Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="symmetric"))
    turned = padded.rotate(
        degrees, Image.Resampling.BICUBIC, center=(center[0] + margin + 0.5, center[1] + margin + 0.5)
    )
    return turned.crop((margin, margin, margin + image.width, margin + image.height))


def draw_frame(crop: FaceImage) -> Image.Image:
    image, face = crop.image.copy(), crop.face
    left, top = face.x - face.width // 2, face.y - face.height // 2
    ImageDraw.Draw(image).rectangle((left, top, left + face.width, top + face.height), outline=DRAWN, width=3)
    return image


def parse_pair(text: str, option: str, kind: type[int] | type[float]) -> Sequence[float]:
    """`width,height`. UserError for anything else."""
    try:
        first, second = (kind(part) for part in text.split(","))
    except ValueError:
        first = second = 0
    if not 0 < first < 100_000 or not 0 < second < 100_000:
        raise UserError(
            f"{option}: {text!r} is no pair of numbers above 0", code="face-crop-pair-invalid", fix=f"{option} 512,512"
        )
    return first, second
