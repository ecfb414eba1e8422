"""Model families, one module each; `register_families` makes all of them known."""

from __future__ import annotations

import importlib
import pkgutil


def register_families() -> None:
    """Import every family module, which registers itself; none of them imports a network library for that."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
