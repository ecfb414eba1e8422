"""Finding classes by name: those of a torch module by the bare name, any other by its dotted path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sfumato.common.quiet_imports import silence_bitsandbytes
from sfumato.common.registry import did_you_mean, find_nearest
from sfumato.errors import UserError


def find_class(
    name: str,
    *,
    option: str,
    default_module: ModuleType,
    base: type,
    package: str = "",
    extra_names: tuple[str, ...] = (),
) -> Any:
    """The callable `Name` of `default_module`, or `package.module.Name`; case-sensitive.

    base: its subclasses are suggested in an error. package: what pip installs where the module is missing.
    extra_names: further names to suggest besides those of `default_module`. UserError where there is none.
    """
    path, _, last = name.rpartition(".")
    module = load_module(path, name, option=option, package=package) if path else default_module
    named = vars(module).get(last)
    if callable(named):
        return named
    known = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
    if path:
        raise UserError(
            f"{option} {name}: {path} has no {last!r}",
            code="class-not-in-module",
            fix=did_you_mean(last, known or vars(module)),
        )
    names = {*known, *extra_names}
    guess = find_nearest(name, names)
    advice = f"did you mean {guess!r}?" if guess else f"known: {', '.join(sorted(names))}."
    raise UserError(
        f"unknown {option} {name!r}",
        code="class-name-unknown",
        fix=f"{advice} Give a class of another package by its dotted name",
    )


def load_module(path: str, name: str, *, option: str, package: str) -> ModuleType:
    """Import a class's module; UserError where it is missing or broken."""
    if path.startswith("bitsandbytes"):
        silence_bitsandbytes()
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if package:
            fix = f'pip install "sfumato[optimizers]", or pip install {package}'
            what = f"{option} {name} needs {package}, which is not installed"
            raise UserError(what, code="optimizer-package-missing", fix=fix) from error
        raise UserError(
            f"{option} {name} needs the module {error.name or path}, which was not found",
            code="class-module-missing",
            fix="check the name, or install the package",
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{option} {name}: {path} cannot be imported: {error}",
            code="class-module-broken",
            fix="reinstall the package",
        ) from error


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of a method's arguments that have no default, `self` aside."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
