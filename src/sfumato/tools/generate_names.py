"""The names of generated images, as gen_img gives them."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

from sfumato.sampling.request import ImageRequest
from sfumato.tools.generate_setup import GenerateRequest

IMAGE_FILE_SUFFIXES = (".png", ".webp")  # of formats that images are written in
FIRST, LAST = "0", "1"  # before the number, of the stages of an image that is made in two


class FileNames:
    """Names that are not taken, neither by a file nor by an image before."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.numbers = count(1 if request.sequential_names else 0)
        self.chosen: set[Path] = set()
        self.first_stages: dict[Path, Path] = {}  # of an image -> the name of its smaller first stage

    def choose(self, image: ImageRequest, name: str | None) -> Path:
        """im_TIME_000_SEED.png and so on; the prompt's own name, or that of the image to start from, where wanted."""
        stage = LAST if image.highres is not None else ""
        start = image.start.init_image if self.request.original_names and image.start is not None else None
        wanted = name or (start and Path(start).stem)
        path = self._find_free(Path(wanted)) if wanted else self._number(stage, image.seed)
        self.chosen.add(path)
        return path

    def _number(self, stage: str, seed: int) -> Path:
        stamp = time.strftime("%Y%m%d%H%M%S")
        for number in self.numbers:
            path, first = (self._format(mark, number, stamp, seed) for mark in (stage, FIRST))
            if self._is_free(path) and self._is_free(first):
                self.first_stages[path] = first
                return path
        raise AssertionError("numbers do not end")

    def _format(self, stage: str, number: int, stamp: str, seed: int) -> Path:
        is_sequential = self.request.sequential_names
        name = f"im_{stage}{number:06d}.png" if is_sequential else f"im_{stamp}_{stage}{number:03d}_{seed}.png"
        return self.request.outdir / name

    def _find_free(self, name: Path) -> Path:
        """In the folder of the images; a number is added where the name is taken."""
        if name.suffix.lower() not in IMAGE_FILE_SUFFIXES:
            name = name.with_name(f"{name.name}.png")
        path = self.request.outdir / name.name
        for number in count(1):
            if self._is_free(path):
                break
            path = self.request.outdir / f"{name.stem}_{number}{name.suffix}"
        self.first_stages[path] = path.with_name(f"{path.stem}_1st{path.suffix}")
        return path

    def _is_free(self, path: Path) -> bool:
        return path not in self.chosen and not path.exists()


def find_free_sheet(folder: Path, kind: str) -> Path:
    """A name for a sheet of images: grid_TIME.png and so on."""
    stamp = time.strftime("%Y%m%d%H%M%S")
    names = (f"{kind}_{stamp}{f'_{number}' if number else ''}.png" for number in count())
    return next(path for name in names if not (path := folder / name).exists())
