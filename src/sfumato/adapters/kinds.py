"""Which kind of adapter a run or a file asks for, and adapters of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from torch import Tensor

from sfumato.adapters import register_adapters
from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest
from sfumato.config.base import Options
from sfumato.errors import UserError
from sfumato.formats.adapter_file import AdapterFile, parse_adapter_file
from sfumato.formats.adapter_kind import AdapterKind, Kinds
from sfumato.formats.groups import LayerGroup

OptionsByKind = Mapping[str, Options]  # name of a kind -> its arguments


KindsByName = Mapping[str, type[Adapter]]


def list_kinds() -> KindsByName:
    """Every kind by its name."""
    register_adapters()
    return _list_kinds(ADAPTERS.names)


@cache  # asked for each layer of a model; what is registered later is in the names
def _list_kinds(names: tuple[str, ...]) -> KindsByName:
    return {name: ADAPTERS.get(name) for name in names}


def list_related(name: str) -> KindsByName:
    """The kind of this name, what may come in its place or beside it, and the wrappers: with arguments in one run."""
    register_adapters()
    return _list_related(name, ADAPTERS.names)


@cache
def _list_related(name: str, names: tuple[str, ...]) -> KindsByName:
    kinds = _list_kinds(names)
    own = ADAPTERS.get(name)
    wrappers = {other: kind for other, kind in kinds.items() if kind.is_wrapper and own.takes_wrappers}
    others = {other: kind for other, kind in kinds.items() if kind.replaces == name or kind.of_norms}
    return {name: own} | wrappers | others


def choose_kinds(name: str, options: OptionsByKind, group: LayerGroup | None) -> tuple[type[Adapter], ...]:
    """The kinds of a group's adapter, or of any group's, wrappers first. options: of all that `list_related` gives."""
    related = list_related(name)
    if group is not None and group.is_norm:
        return tuple(kind for kind in related.values() if kind.of_norms)
    related = {other: kind for other, kind in related.items() if other == name or not kind.of_norms}
    wanted = [kind for other, kind in related.items() if other != name and kind.is_wanted(options[other], group)]
    wrappers = [related[other] for other in sorted(related) if related[other] in wanted and related[other].is_wrapper]
    replacements = [kind for kind in wanted if not kind.is_wrapper]
    if len(replacements) > 1:
        names = " and ".join(kind.label for kind in replacements)
        raise UserError(
            f"--network_args ask for {names} at once, which are two kinds of adapters",
            code="adapter-kinds-together",
            fix="keep the argument of one of them",
        )
    return (*wrappers, replacements[0] if replacements else related[name])


def create_adapter(
    kinds: tuple[type[Adapter], ...], group: LayerGroup, request: AdapterRequest, options: OptionsByKind
) -> Adapter:
    """A new adapter of these kinds, from `choose_kinds`; the request's own options are those of no kind."""
    names = {kind: name for name, kind in list_kinds().items()}
    adapter: Adapter | None = None
    for kind in reversed(kinds):
        own = options[names[kind]]
        adapter = kind.create(group, replace(request, options=own, inner=adapter))
    assert adapter is not None
    return adapter


def restore_adapter(kinds: Kinds, group: LayerGroup, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a file's tensors, in the form that they have here."""
    adapter: Adapter | None = None
    for kind in reversed(kinds):
        adapter = get_class(kind).from_tensors(group, tensors, adapter)
    assert adapter is not None
    return adapter


def get_class(kind: AdapterKind) -> type[Adapter]:
    """The class that a file's reader knows as a kind."""
    return next(each for each in list_kinds().values() if each is kind)


def read_adapter_file(path: Path) -> AdapterFile:
    """A file, or a folder of PEFT or diffusers, as any program writes it; of every kind that is registered.

    Raises UserError where there is no adapter, one of a foreign kind, or only half of one, and for values that are not
    finite.
    """
    return parse_adapter_file(path, tuple(kind for kind in list_kinds().values() if kind.spellings))
