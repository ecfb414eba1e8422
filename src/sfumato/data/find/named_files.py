"""Where the images lie that are named one by one: relative to a folder, to the current one, or anywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sfumato.data.find.folders import list_folder, list_recursively
from sfumato.data.find.image_table import join_path


def locate_images(keys: Sequence[str], image_dir: Path | None) -> tuple[str, list[str | None]]:
    """The folder and each image's path below it, None where the image is missing.

    A key is a path relative to the folder, with or without its extension, one relative to the current folder, or an
    absolute path. Where not all images are in the folder, paths are absolute and the folder is "".
    """
    folder = os.path.abspath(image_dir) if image_dir else ""  # noqa: PTH100
    folder_names = FolderNames(folder, below=True) if folder else None
    inside = [folder_names.find(key) if folder_names else None for key in keys]
    if all(inside):
        return folder, inside
    listings: dict[str, FolderNames] = {}

    def find_outside(path: str) -> str | None:
        parent, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
        if parent not in listings:
            listings[parent] = FolderNames(parent)
        file = listings[parent].find(name)
        return file and os.path.join(parent, file)  # noqa: PTH118

    absolute: list[str | None] = []
    for key, name in zip(keys, inside, strict=True):
        if name:
            absolute.append(join_path(folder, name))
        else:
            absolute.append(find_outside(key) or find_outside(os.path.join(folder, key)))  # noqa: PTH118
    prefix = folder + os.sep
    if folder and all(path is None or path.startswith(prefix) for path in absolute):
        return folder, [path and path[len(prefix) :] for path in absolute]
    return "", absolute


class FolderNames:
    """The images of a folder, found by name, or by the name without its extension."""

    def __init__(self, folder: str, *, below: bool = False) -> None:
        try:
            images = list_folder(folder).images + (list_recursively(folder).images if below else [])
        except OSError:
            images = []
        self.images = dict(zip(images, images, strict=True))

    @cached_property
    def by_stem(self) -> dict[str, str]:
        return {name[: name.rfind(".")]: name for name in reversed(self.images)}

    @cached_property
    def by_lower_case(self) -> dict[str, str]:
        """Names that differ in capital letters only are one name on most systems."""
        return {name.lower(): name for name in reversed(self.images)}

    def find(self, key: str) -> str | None:
        path = key.replace("\\", "/")
        return (
            self.images.get(key)
            or self.images.get(path)
            or self.by_stem.get(key)
            or self.by_lower_case.get(path.lower())
        )
