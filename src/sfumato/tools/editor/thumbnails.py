"""Small images for the page, made in threads and kept in the cache folder, never among the images."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image

from sfumato.common.files import read_file, write_quickly
from sfumato.data.find.headers import parse_image_header
from sfumato.data.find.image_formats import DECODER_ERRORS, open_image
from sfumato.data.images import TRANSPOSES, decode_layers
from sfumato.errors import UserError
from sfumato.tools.editor.sources import EditedImage

THUMBNAIL_SIDE, VIEW_SIDE = 320, 1400  # pixels of the longer side
WEBP_QUALITY = 82  # of WebP
log = logging.getLogger(__name__)


class ThumbnailCache:
    """folder: of the cache. on_fault: called with an image's number and what is wrong with it."""

    def __init__(self, images: Sequence[EditedImage], folder: Path, on_fault: Callable[[int, str], None]) -> None:
        self.images, self.folder, self.on_fault = images, folder, on_fault
        self._viewers = 0  # requests that are waiting for an image
        self._idle = threading.Condition()
        self._pool: ThreadPoolExecutor | None = None

    def start(self, workers: int) -> None:
        """Make all of them in the background, which finds damaged images, too; what is asked for comes first."""
        self._pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="sfumato-thumbnails")
        self._pool.submit(self._remove_old)
        for number in range(len(self.images)):
            self._pool.submit(self._prepare, number)

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def get(self, number: int, side: int) -> bytes:
        """An image as WebP. UserError where it cannot be read."""
        with self._idle:
            self._viewers += 1
        try:
            return self._read_or_make(number) if side == THUMBNAIL_SIDE else self._make(number, side)
        finally:
            with self._idle:
                self._viewers -= 1
                self._idle.notify_all()

    def _prepare(self, number: int) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self._viewers, timeout=5)
        with suppress(UserError):  # which the page learns of
            self._read_or_make(number)

    def _read_or_make(self, number: int) -> bytes:
        image = self.images[number]
        if image.fault:
            raise UserError(f"{image.name} {image.fault}", code="editor-image-faulty")
        path = self.folder / get_thumbnail_name(image)
        try:
            return read_file(path)
        except OSError:
            data = self._make(number, THUMBNAIL_SIDE)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_quickly(path, data)
        except OSError as error:
            log.debug("cannot keep %s: %s", path, error)
        return data

    def _remove_old(self) -> None:
        """Those of images that are gone, or were other ones."""
        wanted = {get_thumbnail_name(image) for image in self.images}
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.suffix == ".webp" and path.name not in wanted:
                    path.unlink()

    def _make(self, number: int, side: int) -> bytes:
        image = self.images[number]
        try:
            return shrink_image(read_file(image.path), str(image.path), side)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        except UserError as error:
            fault = error.what.removeprefix(str(image.path)).strip()
        self.on_fault(number, fault)
        raise UserError(f"{image.name} {fault}", code="editor-image-unreadable")


def get_thumbnail_name(image: EditedImage) -> str:
    digest = hashlib.blake2b(f"{image.path}\0{image.version}".encode(errors="surrogatepass"), digest_size=16)
    return f"{digest.hexdigest()}.webp"


def shrink_image(data: bytes, path: str, side: int) -> bytes:
    """The image, upright, with its longer side at most `side`, as WebP with its transparency. UserError as of
    `decode_layers`, which a damaged image ends in.

    JPEGs are decoded at a fraction of their size, which is several times faster.
    """
    small = shrink_jpeg(data, path, side) if data.startswith(b"\xff\xd8\xff") else None
    if small is None:
        small, alpha = decode_layers(data, path, alpha=True)
        if alpha is not None and alpha.getextrema()[0] != 255:
            small.putalpha(alpha)
    small.thumbnail((side, side), reducing_gap=2.0)
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=WEBP_QUALITY, method=2)
    return buffer.getvalue()


def shrink_jpeg(data: bytes, path: str, side: int) -> Image.Image | None:
    """None where only the full decoder knows what to do: other colors than RGB, profiles, damage."""
    orientation = parse_image_header(data, path).orientation
    try:
        with open_image(BytesIO(data)) as image:
            if image.mode != "RGB" or image.info.get("icc_profile"):
                return None
            image.draft("RGB", (side * 2, side * 2))
            image.load()
            small = image.copy()
    except DECODER_ERRORS:
        return None
    return small if orientation == 1 else small.transpose(TRANSPOSES[orientation])
