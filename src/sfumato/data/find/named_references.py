"""Reference images that a metadata file names beside each image: reference_1, reference_2 ..., or control_path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sfumato.common.text import list_some, plural
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import read_images
from sfumato.data.find.image_table import ImageTable, IntColumn
from sfumato.data.find.named_files import locate_images
from sfumato.data.find.policy import Policy, select_valid_images
from sfumato.data.find.settings import SubsetSettings

REFERENCE_FIELD = re.compile(r"reference_(\d+)|control_path(?:_(\d+))?")  # the second: other programs' JSON lines


def list_reference_names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of an entry's reference images, by their numbers."""
    found: list[tuple[int, str]] = []
    for field, value in fields.items():
        match = REFERENCE_FIELD.fullmatch(field)
        if match and isinstance(value, str):
            found.append((int(match[1] or match[2] or 0), value))
    return tuple(name for _, name in sorted(found))


def attach_named_references(
    images: ImageTable, names: Sequence[Sequence[str]], subset: SubsetSettings, policy: Policy, findings: Findings
) -> ImageTable:
    """The images whose reference images are all valid, each with them. names: of each image's references, in order.

    Adds a problem for images with fewer references than others, and for references that are missing.
    """
    count = max(map(len, names), default=0)
    lacking = [name for name, own in zip(images.names, names, strict=True) if len(own) < count]
    if lacking:
        findings.problems.add(
            f"{subset.where}: {plural(len(lacking), 'image has', 'images have')} fewer reference images than the "
            f"{count} of others: "
            f"{list_some(lacking)}",
            code="metadata-references-incomplete",
            fix="name as many for each, or put the images without into a subset of their own",
        )
        return images
    rows = np.arange(len(images))
    for number in range(count):
        table, valid = read_named_references(
            [names[row][number] for row in rows.tolist()], number, subset, policy, findings
        )
        if table is None:
            return images
        images, rows = images.take(valid).with_references((*images.take(valid).references, table)), rows[valid]
    return images


def read_named_references(
    keys: Sequence[str], number: int, subset: SubsetSettings, policy: Policy, findings: Findings
) -> tuple[ImageTable | None, IntColumn]:
    """The valid ones of these files, and which of the keys they are; one file may be named often.

    None, and a problem, where files are missing.
    """
    where = f"{subset.where}: reference_{number + 1}"
    base, paths = locate_images(keys, subset.image_dir)
    missing = [key for key, path in zip(keys, paths, strict=True) if path is None]
    if missing:
        findings.problems.add(
            f"{where}: {plural(len(missing), 'reference image is', 'reference images are')} missing: "
            f"{list_some(missing)}",
            code="metadata-references-missing",
            fix="give paths relative to image_dir, or absolute ones",
        )
        return None, np.arange(0)
    files = list(dict.fromkeys(path for path in paths if path is not None))
    position = {path: index for index, path in enumerate(files)}
    column = np.array([position[path] for path in paths if path is not None], np.int64)
    headers = read_images(base, files, policy.index("images", base, where))
    valid = np.flatnonzero(np.isin(column, select_valid_images(headers, where, policy, findings)))
    return headers.make_table(base, column[valid]), valid
