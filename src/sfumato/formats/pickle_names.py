"""A check of pickled checkpoints before torch reads them: the names of classes and functions in them are short.

torch refuses the names that it does not know with a message that it searches itself, in a time that grows with the
square of the name's length: a name of 100 kB takes minutes.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from sfumato.common.files import open_file

NAMING = ("GLOBAL", "INST")  # operations that name a class or function
MAX_NAME = 1000  # letters
OLD_PICKLES = 4  # of torch's older format before the weights: a number, a version, facts, the content


def check_pickled_names(path: Path, *, is_zip: bool) -> None:
    """pickle.UnpicklingError for a name that is too long; errors of pickletools and zipfile where it is damaged."""
    with open_file(path) as file:
        for stream in list_streams(file, is_zip=is_zip):
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name in NAMING and len(str(argument)) > MAX_NAME:
                    raise pickle.UnpicklingError("a name in it is too long")


def list_streams(file: BinaryIO, *, is_zip: bool) -> Iterator[BinaryIO]:
    """The pickles of a file, one after the other."""
    if not is_zip:
        yield from [file] * OLD_PICKLES
        return
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                yield BytesIO(archive.read(name))
