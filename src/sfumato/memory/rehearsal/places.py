"""Where in the program something happens: the line of ours, or the module whose forward is running."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType

import torch
from torch import nn

from sfumato import __file__ as package_file

PACKAGE = package_file.removesuffix("__init__.py")
_HERE = __file__.removesuffix("places.py")
_TORCH = torch.__file__.removesuffix("__init__.py")
_BACKWARD = "_engine_run_backward"  # torch's function below which backward runs


def find_place() -> str:
    """file:line of the innermost line of this program, and of the library's line that it has called, if there is one.

    Lines of torch and of the rehearsal do not count.
    """
    outside = ""
    for frame in _walk():
        file = frame.f_code.co_filename
        if file.startswith(_HERE):
            continue
        if file.startswith(PACKAGE):
            place = f"{file.removeprefix(PACKAGE)}:{frame.f_lineno}"
            return f"{place} in {outside}" if outside else place
        if not outside and not file.startswith(_TORCH):
            outside = f"{file.rpartition('/')[2]}:{frame.f_lineno}"
    return outside


def find_origin(module_names: Mapping[int, str]) -> str:
    """The innermost module of `module_names` (id -> name) whose forward is running, else "backward" or `find_place`."""
    for frame in _walk():
        name = frame.f_code.co_name
        if name == "forward":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in module_names:
                return module_names[id(owner)]
        elif name == _BACKWARD:
            return "backward"
    return find_place()


def _walk() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
