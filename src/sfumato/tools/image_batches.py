"""The images of a folder in batches, decoded in threads ahead of the model that looks at them."""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image

from sfumato.common.files import read_file
from sfumato.common.text import plural
from sfumato.data.find.folders import list_folder, list_recursively
from sfumato.data.find.headers import parse_image_header
from sfumato.data.images import decode_image
from sfumato.errors import UserError

Content = TypeVar("Content")
BATCHES_AHEAD = 2
MAX_NAMED = 10  # unreadable images that the last lines name


@dataclass(frozen=True, kw_only=True)
class ReadImage(Generic[Content]):
    """An image that was read. size: width and height in pixels. content: as the model takes it."""

    path: Path
    size: tuple[int, int]
    content: Content


@dataclass(frozen=True, kw_only=True)
class ImageReader(Generic[Content]):
    """prepare: from a file's bytes and its name to what the model takes. faults: of images that cannot be read, which
    are left out of their batch.
    """

    prepare: Callable[[bytes, str], Content]
    batch_size: int
    workers: int
    faults: list[str]

    def read(self, path: Path) -> ReadImage[Content] | None:
        try:
            data = read_file(path)
            header = parse_image_header(data, str(path))
            return ReadImage(path=path, size=(header.width, header.height), content=self.prepare(data, str(path)))
        except (OSError, UserError) as error:
            self.faults.append(str(error))
            return None

    def read_batches(self, images: Sequence[Path]) -> Iterator[tuple[int, list[ReadImage[Content]]]]:
        """(how many files, those of them that can be read); two batches are decoded ahead."""
        waiting, size = iter(images), self.batch_size
        ready: deque[Future[ReadImage[Content] | None]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sfumato-images") as pool:
            try:
                while True:
                    missing = (BATCHES_AHEAD + 1) * size - len(ready)
                    ready += [pool.submit(self.read, path) for path in islice(waiting, missing)]
                    if not ready:
                        return
                    batch = [ready.popleft().result() for _ in range(min(size, len(ready)))]
                    yield len(batch), [image for image in batch if image is not None]
            finally:
                for future in ready:
                    future.cancel()


class UniqueNames:
    """Names for files that are made of images, without endings: those of the images, but each one once."""

    def __init__(self) -> None:
        self.chosen: set[str] = set()

    def choose(self, path: Path) -> str:
        """a, then a_jpg for a.jpg beside a.png, then a_2 and so on."""
        others = (f"{path.stem}_{number}" for number in count(2))
        names = chain((path.stem, f"{path.stem}_{path.suffix.lower().removeprefix('.')}"), others)
        name = next(name for name in names if name.casefold() not in self.chosen)
        self.chosen.add(name.casefold())
        return name


def list_image_paths(folder: Path, *, recursive: bool, shard: tuple[int, int] | None = None) -> list[Path]:
    """The images of a folder. UserError where it has none.

    shard: index and number of the machines that do a part each. An image's name inside the folder alone says whose it
    is, so it stays there whatever is added, and the machines may have different images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", code="image-folder-missing", fix="give a folder of images")
    names = list_folder(str(folder)).images
    if recursive:
        names = [*names, *list_recursively(str(folder)).images]
    if not names:
        inside = "" if recursive else "; --recursive looks into its subfolders, too"
        raise UserError(f"{folder} has no images{inside}", code="image-folder-empty", fix="give a folder of images")
    if shard is not None:
        index, number = shard
        names = [name for name in names if zlib.crc32(Path(name).as_posix().encode()) % number == index]
    return [folder / name for name in names]


def iterate_images(
    paths: Sequence[Path], faults: list[str], progress: Callable[[int, int], None]
) -> Iterator[tuple[Path, Image.Image]]:
    """Each image that can be read; why others cannot is added to `faults`. progress: is told how many are done."""
    for done, path in enumerate(paths, 1):
        try:
            image = decode_image(read_file(path), str(path))
        except (OSError, UserError) as error:
            faults.append(str(error))
        else:
            yield path, image
        progress(done, len(paths))


def report_unreadable(faults: Sequence[str], what: str) -> None:
    """what: has not been done with them."""
    for fault in sorted(faults)[:MAX_NAMED]:
        sys.stderr.write(f"{what}: {fault}\n")
    if len(faults) > MAX_NAMED:
        sys.stderr.write(f"{what}: {plural(len(faults) - MAX_NAMED, 'further image')} that cannot be read\n")
