"""What is trained: one file per method; a method sees a model only through Family."""

from __future__ import annotations

import importlib
import pkgutil

from sfumato.config import Config
from sfumato.methods.base import METHODS, Method


def make_method(config: Config) -> Method:
    """The method that the configuration names, built from the configuration alone."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return METHODS.get(config.run.method)(config)
