"""Classes by their names: those of a torch module by the bare name, any other by its dotted path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sfumato.common.registry import did_you_mean, nearest
from sfumato.errors import UserError


def find_class(
    name: str, *, option: str, home: ModuleType, base: type, package: str = "", more: tuple[str, ...] = ()
) -> Any:
    """`Name` of the module `home`, or `package.module.Name`; upper and lower case count.

    base: what lists the names of a module in an error. package: what pip installs where the module is missing.
    more: names that are known besides those of `home`.
    """
    path, _, last = name.rpartition(".")
    module = load_module(path, name, option=option, package=package) if path else home
    found = vars(module).get(last)
    if callable(found):
        return found
    known = [each for each, thing in vars(module).items() if inspect.isclass(thing) and issubclass(thing, base)]
    if path:
        raise UserError(f"{option} {name}: {path} has no {last!r}", fix=did_you_mean(last, known or vars(module)))
    guess = nearest(name, {*known, *more})
    advice = f"did you mean {guess!r}?" if guess else f"known: {', '.join(sorted({*known, *more}))}"
    raise UserError(f"unknown {option} {name!r}", fix=f"{advice} Classes of other packages go by their dotted names")


def load_module(path: str, name: str, *, option: str, package: str) -> ModuleType:
    """Import what holds a class; what is missing or broken is one line."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        fix = f'pip install "sfumato[optimizers]", or pip install {package}' if package else "check it, or install it"
        what = f"{package}, which is not installed" if package else f"the module {missing}, which is not there"
        raise UserError(f"{option} {name} needs {what}", fix=fix) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{option} {name}: {path} cannot be loaded: {error}") from error


def needs_more(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without which a method cannot be called."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [each.name for each in parameters if each.kind in kinds and each.default is each.empty]
