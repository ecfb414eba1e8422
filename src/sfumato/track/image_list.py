"""The images of a run, by the numbers that its metrics file calls them; in the cache folder, since it has paths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sfumato.common import files
from sfumato.common.json_toml import decode_json
from sfumato.config.run_record import find_run_record
from sfumato.data.find.image_table import ImageRow
from sfumato.data.find.index import get_default_cache_dir
from sfumato.data.plans import DataPlan
from sfumato.errors import UserError

IMAGES_SUFFIX = ".images.jsonl"
MAX_LISTED = 200_000  # images; more are not listed, since a list and its ranking would take too long


class ListedImage(NamedTuple):
    """An image file, and its caption before shuffling and dropout."""

    path: str
    caption: str
    archive: str = ""  # that holds it
    offset: int = 0  # bytes, in the archive
    byte_count: int = 0

    def read(self) -> bytes:
        """The bytes of the image file. UserError where they cannot be read, OSError where it is no plain file."""
        if not self.archive:
            return files.read_file(self.path)
        return ImageRow(self.path, self.byte_count, 0, 0, 0, "", self.archive, self.offset).read()


def find_image_list(folder: Path, name: str) -> Path:
    """The file for a run of this name in this output folder; it need not exist."""
    return find_run_record(get_default_cache_dir(), folder, name).with_suffix(IMAGES_SUFFIX)


def write_image_list(path: Path, data: DataPlan, *, continued: bool) -> Sequence[int]:
    """Write the list; gives the number of each training image by its position in the plan, () where none is listed.

    continued: whether the metrics file keeps lines of earlier steps. Images then keep the numbers that they had, and
    new ones get others; where the numbers are not known any more none is listed. UserError for a damaged list, OSError
    where the folder cannot be written.
    """
    rows = list(iterate_training_images(data))
    if not rows or len(rows) > MAX_LISTED or (continued and not path.is_file()):
        return ()
    images: dict[str, ListedImage] = {}
    if continued:
        images = {image.path: image for image in read_image_list(path)}
    numbers = {name: number for number, name in enumerate(images)}
    found: list[int] = []
    for row in rows:
        name = str(Path(row.path).absolute())
        archive = str(Path(row.archive).absolute()) if row.archive else ""
        images[name] = ListedImage(name, row.caption, archive, row.offset, row.byte_count)
        found.append(numbers.setdefault(name, len(numbers)))
    lines = [json.dumps(image._asdict(), ensure_ascii=True) for image in images.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(f"{line}\n" for line in lines))
    return found


def iterate_training_images(data: DataPlan) -> Iterator[ImageRow]:
    """In the order of the sampler's numbers; nothing where prompts stand in the place of images."""
    subsets = [subset for dataset in data.datasets for subset in dataset.subsets]
    if any(subset.settings.concept is not None for subset in subsets):
        return
    for subset in subsets:
        yield from subset.items.images


def read_image_list(path: Path) -> list[ListedImage]:
    """UserError where the file cannot be read or is none."""
    try:
        rows = [decode_json(line) for line in files.read_file(path).splitlines()]
        return [make_listed_image(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no list of a run's images ({error})",
            code="image-list-invalid",
            fix="remove it; a run writes it when it starts",
        ) from error


def make_listed_image(row: dict[str, object]) -> ListedImage:
    image = ListedImage(**row)  # pyright: ignore[reportArgumentType] -- checked below
    texts, counts = (image.path, image.caption, image.archive), (image.offset, image.byte_count)
    if not all(isinstance(text, str) for text in texts) or not all(type(count) is int for count in counts):
        raise ValueError("an image was expected in every line")
    return image
