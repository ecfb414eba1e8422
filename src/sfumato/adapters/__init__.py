"""Kinds of adapters, one class each; `register_adapters` makes all of them known, those of other packages too."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from sfumato.common.names import ADAPTER_ENTRY_POINTS


@cache
def register_adapters() -> None:
    """Import every module with a kind, which registers itself."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group=ADAPTER_ENTRY_POINTS):
        entry.load()
