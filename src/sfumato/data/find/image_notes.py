"""What is said of a subset's images before the first step: kinds that are not read, frames, color profiles, alpha."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sfumato.common.text import list_some, plural
from sfumato.data.find.findings import Findings
from sfumato.data.find.image_formats import get_extension
from sfumato.data.find.image_table import ImageTable, IntColumn
from sfumato.data.find.traits import BROKEN_PROFILE, CONVERTED, FRAMES, PLAIN

LISTED_NAMES = 5
TRAIT_NOTES = (
    (FRAMES, "{images} have several frames or pages, and the first of each is used"),
    (CONVERTED, "{images} have an embedded color profile that is not sRGB, and are converted to sRGB"),
    (
        BROKEN_PROFILE,
        "{images} have an embedded color profile that is damaged or of another color space; it is ignored",
    ),
)


def report_unread(names: Sequence[str], where: str, findings: Findings) -> None:
    """Report files that people take for images and that are not read, by their endings."""
    if names:
        counts = Counter(map(get_extension, names)).most_common()
        kinds = ", ".join(f"{extension} ({count})" for extension, count in counts)
        files = plural(len(names), "file is no image", "files are no images")
        findings.note(f"{where}: {files} that sfumato reads: {kinds}")


def report_image_folders(folders: Sequence[str], where: str, findings: Findings) -> None:
    """Report folders whose names end like those of images."""
    if folders:
        one = "name ends like that of an image and is a folder"
        what = plural(len(folders), one, "names end like those of images and are folders")
        findings.note(f"{where}: {what}: {list_some(folders)}")


def report_traits(images: ImageTable, where: str, findings: Findings) -> None:
    """Report what is done to images because of what their headers show, one line per kind."""
    for trait, text in TRAIT_NOTES:
        rows = find_rows_with(images, trait)
        if len(rows):
            count = f"{len(rows)} of {plural(len(images), 'image')}"
            findings.note(f"{where}: {text.format(images=count)}: {list_names(images, rows)}")


def find_rows_with(images: ImageTable, trait: int) -> IntColumn:
    """The rows of the images that have a trait."""
    return np.flatnonzero((PLAIN if images.traits is None else images.traits) & np.int64(trait))


def list_names(images: ImageTable, rows: IntColumn) -> str:
    """The names of the first of these images, and how many more there are."""
    some = [images.names.get_row(row) for row in rows[:LISTED_NAMES].tolist()]
    more = len(rows) - len(some)
    return ", ".join(some) + (f" and {more} more" if more else "")
