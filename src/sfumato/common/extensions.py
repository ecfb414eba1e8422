"""Modules outside of the package that register more of something: named by an option, or by an entry point.

What registers itself, e.g. a kind of adapter or a loss, is found by its name in the registry, by the name of an entry
point in its group, or, where a module registers one thing alone, by the module's name. docs/extending.md shows both.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from sfumato.common.registry import Registry
from sfumato.errors import UserError

ADAPTERS_GROUP, LOSSES_GROUP = "sfumato.adapters", "sfumato.losses"  # of entry points


def is_extension(name: str, group: str) -> bool:
    """Whether an installed package brings a thing of this name, or Python finds a module of it; nothing is imported."""
    if any(entry.name == name for entry in entry_points(group=group)):
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@cache
def load_entry_points(group: str) -> None:
    """Import what the group's entry points name, once."""
    for entry in entry_points(group=group):
        entry.load()


def import_extension(name: str, *, option: str) -> ModuleType:
    """UserError where the module cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{option} {name} cannot be imported ({error})",
            code="extension-not-importable",
            fix="install it, or set PYTHONPATH to the folder that it is in",
        ) from error


def list_registered(registry: Registry[Any], module: str) -> list[str]:
    """The names of what a module has registered."""
    return [name for name in registry.names if registry.get(name).__module__ == module]


def find_registered(registry: Registry[Any], name: str, *, group: str, option: str) -> str:
    """The registered name of what an option means, which is imported if it must be; UserError where there is none."""
    load_entry_points(group)
    if name in registry:
        return name
    import_extension(name, option=option)
    own = list_registered(registry, name)
    if len(own) != 1:
        raise UserError(
            f"{option} {name}: the module registers {len(own)} {registry.noun}s instead of one",
            code="extension-without-thing",
            fix="docs/extending.md shows how one is registered",
        )
    return own[0]
