"""Images of edges for control images, of one image or of a folder's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.common.files import check_writable, read_file, write_atomically
from sfumato.data.edges import find_edges
from sfumato.data.images import decode_image
from sfumato.errors import UserError
from sfumato.tools.image_batches import UniqueNames, list_image_paths, report_unreadable
from sfumato.track.progress_task import ProgressTask


def write_edges(source: Path, target: Path, low: float, high: float) -> int:
    """Of one image into a file, or of a folder's images into another folder; gives how many could not be read."""
    if not source.is_dir():
        if not source.is_file():
            raise UserError(
                f"--input: {source} does not exist", code="canny-input-missing", fix="give an image or a folder"
            )
        write_edge_image(source, target / f"{source.stem}.png" if target.is_dir() else target, low, high)
        return 0
    if source.resolve() == target.resolve():
        raise UserError(
            f"the edges would replace the images of {source}", code="canny-into-source", fix="give another --output"
        )
    images = list_image_paths(source, recursive=False)
    check_writable(target, option="--output")
    target.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    names = UniqueNames()
    with ProgressTask("finding edges", "images") as progress:
        for done, path in enumerate(images, 1):
            try:
                write_edge_image(path, target / f"{names.choose(path)}.png", low, high)
            except (OSError, UserError) as error:
                faults.append(str(error))
            progress(done, len(images))
    report_unreadable(faults, "no edges")
    return len(faults)


def write_edge_image(source: Path, target: Path, low: float, high: float) -> None:
    """White edges on black, in the format that the name says, PNG for any other."""
    if source.resolve() == target.resolve():
        raise UserError(f"the edges would replace {source}", code="canny-onto-image", fix="give another --output")
    pixels = np.asarray(decode_image(read_file(source), str(source)))[..., ::-1]  # of equal channels OpenCV takes blue
    edges = find_edges(pixels, low, high)
    kind = (
        "JPEG" if target.suffix.lower() in (".jpg", ".jpeg") else "WEBP" if target.suffix.lower() == ".webp" else "PNG"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(target) as temporary:
        Image.fromarray(edges.astype(np.uint8) * 255).save(temporary, kind, quality=95, lossless=True)
