"""Smaller copies of images, one for each resolution."""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sfumato.common.files import check_writable, write_atomically
from sfumato.common.text import list_some
from sfumato.data.buckets import Size
from sfumato.data.images import RESAMPLING_FILTERS, choose_interpolation
from sfumato.errors import UserError
from sfumato.tools.image_batches import iterate_images, list_image_paths, report_unreadable
from sfumato.track.progress_task import ProgressTask

JPEG_QUALITY = 100


@dataclass(frozen=True, kw_only=True)
class ImageResize:
    """resolutions: (width, height), of which only the product counts: no copy has more pixels. divisible_by: both sides
    are cropped to multiples of it. interpolation: by default area where an image shrinks. copy_others: the files that
    have an image's name with another ending, for each of its copies.
    """

    resolutions: Sequence[Size]
    divisible_by: int = 1
    interpolation: str | None = None
    as_png: bool = False
    copy_others: bool = False

    def run(self, source: Path, target: Path) -> int:
        """Write the copies of every image of a folder; gives how many images could not be read."""
        if source.resolve() == target.resolve():
            raise UserError(
                f"the copies would lie among the images of {source}",
                code="resize-into-source",
                fix="give another folder for them",
            )
        images = list_image_paths(source, recursive=False)
        equal = [stem for stem, count in Counter(path.stem for path in images).items() if count > 1]
        if equal:
            raise UserError(
                f"several images of {source} have one name with different endings: {list_some(equal)}",
                code="resize-names-equal",
                fix="rename all but one of them: their copies would have the same name",
            )
        check_writable(target, option="the folder of the copies")
        target.mkdir(parents=True, exist_ok=True)
        others = copy_other_files(source, target, images)
        faults: list[str] = []
        with ProgressTask("resizing", "images") as progress:
            for path, image in iterate_images(images, faults, progress):
                self._write_copies(image, path, target, others[path.stem])
        report_unreadable(faults, "no copy")
        return len(faults)

    def _write_copies(self, image: Image.Image, path: Path, target: Path, others: Sequence[Path]) -> None:
        for width, height in self.resolutions:
            copy = self.resize(image, width * height)
            name = f"{path.stem}+{width}x{height}"
            write_copy(copy, target / f"{name}{'.png' if self.as_png else '.jpg'}")
            for other in others if self.copy_others else ():
                shutil.copyfile(other, target / f"{name}{other.name.removeprefix(path.stem)}")

    def resize(self, image: Image.Image, pixels: int) -> Image.Image:
        """A copy with so many pixels at most, cropped around its center; one that has no more is only cropped."""
        if image.width * image.height > pixels:
            scale = math.sqrt(pixels / (image.width * image.height))
            size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
            name = choose_interpolation(image.size, size, self.interpolation)
            image = image.resize(size, RESAMPLING_FILTERS[name])
        step = self.divisible_by
        width, height = (max(side // step * step, min(side, step)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


def copy_other_files(source: Path, target: Path, images: Sequence[Path]) -> Mapping[str, Sequence[Path]]:
    """Copy all that is no image as it is; gives these files by their names without the ending."""
    others: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(set(source.iterdir()) - set(images)):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
            others[path.stem].append(path)
    return others


def write_copy(image: Image.Image, path: Path) -> None:
    with write_atomically(path) as temporary:
        if path.suffix == ".png":
            image.save(temporary, "PNG")
        else:
            image.save(temporary, "JPEG", quality=JPEG_QUALITY)


def parse_resolutions(text: str) -> list[Size]:
    """`512x512,384x384`."""
    sizes: list[Size] = []
    for part in text.split(","):
        sides = part.strip().lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and 0 < int(side[:9]) < 100_000 for side in sides):
            raise UserError(
                f"--max_resolution: {part.strip()!r} is no size", code="resize-resolution-invalid", fix="write 512x512"
            )
        sizes.append((int(sides[0]), int(sides[1])))
    return sizes
