"""`sfumato dataset face-crop`: crops around faces."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sfumato.cli.options_command import run_with_options
from sfumato.common.text import plural
from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import FilePath
from sfumato.errors import Problems

if TYPE_CHECKING:
    from sfumato.tools.face_crop import FaceCrop

PixelPair = Annotated[str, Metavar("WIDTH,HEIGHT")]


class FaceCropOptions(Options):
    """Finds faces, drawn ones above all, and writes crops around them as PNG files, whose names say where the face is:
    name_x_y_width_height, which --face_crop_aug_range reads. Needs onnxruntime (pip install "sfumato[tagger]"). The
    model is downloaded once.
    """

    src_dir: FilePath = option(None, "the folder of images", required=True)
    dst_dir: FilePath = option(None, "the folder of the crops", required=True)
    rotate: bool = option(False, "turn images so that both eyes are at one height")
    resize_fit: bool = option(False, "resize the image so that the crop just covers it")
    resize_face_size: int | None = option(None, "resize the image so that the face has this size", ge=1)
    crop_size: PixelPair | None = option(None, "pixels of the crop; the whole image by default")
    crop_ratio: PixelPair | None = option(None, "size of the crop, in sizes of the face")
    min_size: int | None = option(None, "the smallest face that is taken, in pixels", ge=0)
    max_size: int | None = option(None, "skip larger faces, and those of this size", ge=1)
    multiple_faces: bool = option(False, "a crop for each face of an image; of the largest by default")
    debug: bool = option(False, "draw a frame around the face")
    min_score: float = option(0.3, "how sure the detector must be", ge=0, le=1)
    model_file: FilePath | None = option(None, "a detector of your own: a YOLO model in the ONNX format")
    eye_model_file: FilePath | None = option(None, "the same for eyes, with --rotate")
    model_dir: FilePath = option(Path("face_models"), "where models are kept")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset face-crop`."""
    return run_with_options("sfumato dataset face-crop", argv, FaceCropOptions, run_face_crop)


def run_face_crop(options: FaceCropOptions) -> int:
    """Crop; gives the exit code."""
    check_exclusive(options)
    count, faults = make_face_crop(options).run(options.src_dir, options.dst_dir)
    bad = f", {plural(faults, 'image')} could not be read" if faults else ""
    sys.stdout.write(f"{plural(count, 'crop is', 'crops are')} in {options.dst_dir}{bad}\n")
    return 0


def check_exclusive(options: FaceCropOptions) -> None:
    """UserError for options that say two sizes."""
    problems = Problems()
    for other, given in (("--resize_fit", options.resize_fit), ("--crop_ratio", options.crop_ratio is not None)):
        if options.resize_face_size is not None and given:
            problems.add(
                f"--resize_face_size and {other} both say a size", code="face-sizes-conflict", fix="give one of them"
            )
    problems.raise_all()


def make_face_crop(options: FaceCropOptions) -> FaceCrop:
    from sfumato.tools.face_crop import FaceCrop, parse_pair
    from sfumato.tools.face_detector import EYES, FACES, open_detector

    size = parse_pair(options.crop_size, "--crop_size", int) if options.crop_size else None
    ratio = parse_pair(options.crop_ratio, "--crop_ratio", float) if options.crop_ratio else None
    folder = options.model_dir
    return FaceCrop(
        faces=open_detector(options.model_file, FACES, folder, option="--model_file"),
        eyes=open_detector(options.eye_model_file, EYES, folder, option="--eye_model_file") if options.rotate else None,
        min_score=options.min_score,
        size=(int(size[0]), int(size[1])) if size else None,
        ratio=(ratio[0], ratio[1]) if ratio else None,
        fit=options.resize_fit,
        face_size=options.resize_face_size,
        min_size=options.min_size,
        max_size=options.max_size,
        multiple=options.multiple_faces,
        framed=options.debug,
    )
