"""Kinds of adapters, one class each; `register_adapters` makes all of them known, those of other packages too."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from sfumato.common.extensions import ADAPTERS_GROUP, load_entry_points


@cache
def register_adapters() -> None:
    """Import every module with a kind, which registers itself."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    load_entry_points(ADAPTERS_GROUP)
