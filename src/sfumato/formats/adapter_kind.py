"""What a kind of adapters says about itself to those who read files; the kinds themselves are classes in adapters/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sfumato.common.text import list_some
from sfumato.errors import UserError
from sfumato.formats.adapter_keys import ALPHA
from sfumato.formats.groups import LayerGroup
from sfumato.formats.peft_config import PeftConfig

LayerTensors = dict[str, Tensor]  # name of a tensor here -> tensor


@dataclass(frozen=True, kw_only=True)
class FileLayer:
    """The tensors of one kind that a file has for one layer, as they were read."""

    path: Path
    name: str
    tensors: LayerTensors
    config: PeftConfig | None = None  # what PEFT or diffusers have stored beside them
    config_name: str = ""  # the layer's name there

    def find_alpha(self, rank: int) -> float:
        """alpha, from its tensor or what is stored beside it; the rank where nothing says it."""
        if ALPHA in self.tensors:
            return float(self.tensors[ALPHA])
        return self.config.find_alpha(self.config_name, rank) if self.config else float(rank)

    def check_complete(self, names: Iterable[str]) -> None:
        """UserError where one of these tensors is missing."""
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise UserError(
                f"{self.path}: {self.name} has {', '.join(self.tensors)} but no {' and no '.join(missing)}",
                code="adapter-matrix-missing",
                fix="save or download the file again",
            )

    def make_mismatch_error(self, first: str, second: str) -> UserError:
        """For two tensors whose shapes do not belong together."""
        shapes = " and ".join(str(tuple(self.tensors[name].shape)) for name in (first, second))
        return UserError(
            f"{self.path}: the matrices of {self.name} do not belong together: {shapes}",
            code="adapter-matrices-mismatch",
            fix="save or download the file again",
        )


@dataclass(frozen=True, eq=False)
class LayerMatch:
    """One name of a file, the layers that it changes, in the rows of the file's layout, its kinds and its tensors."""

    name: str
    view: LayerGroup
    kinds: Kinds
    tensors: LayerTensors


class AdapterKind(Protocol):
    """A class of adapters, as far as files are concerned; see `sfumato.adapters.base.Adapter`."""

    @property
    def label(self) -> str: ...

    @property
    def spellings(self) -> Mapping[str, str]: ...

    @property
    def plain_spellings(self) -> Mapping[str, str]: ...

    @property
    def is_wrapper(self) -> bool: ...

    def owns(self, tensors: Mapping[str, Tensor]) -> bool: ...

    def complete(self, layer: FileLayer) -> LayerTensors: ...

    def find_weight_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]: ...

    def join(self, group: LayerGroup, found: Sequence[LayerMatch]) -> LayerTensors: ...


Kinds = tuple[AdapterKind, ...]  # of one adapter: wrappers first, the adapter that they wrap last


def collect_spellings(kinds: Iterable[AdapterKind]) -> dict[str, str]:
    """The end of a key -> the tensor's name here, of all kinds."""
    spellings: dict[str, str] = {}
    for kind in kinds:
        spellings |= kind.spellings
    return spellings


def list_tensor_names(kind: AdapterKind) -> set[str]:
    """The names of all tensors that this kind may have."""
    return {*kind.spellings.values(), *kind.plain_spellings.values(), ALPHA}


def list_marks(kind: AdapterKind) -> set[str]:
    """The names of tensors that other kinds do not have, or only in other shapes (see `owns`)."""
    return {*kind.spellings.values()} - {ALPHA}


def find_kinds(tensors: Mapping[str, Tensor], kinds: Iterable[AdapterKind]) -> Kinds:
    """The kinds that have these tensors, wrappers first."""
    found = [kind for kind in kinds if tensors.keys() & list_marks(kind) and kind.owns(tensors)]
    return tuple(sorted(found, key=lambda kind: not kind.is_wrapper))


def describe_kinds(kinds: Kinds) -> str:
    """Their labels, e.g. DoRA of LoRA."""
    return " of ".join(kind.label for kind in kinds)


def take_whole(group: LayerGroup, found: Sequence[LayerMatch]) -> LayerTensors:
    """The tensors of the one match that has the group's layers; UserError where the file divides them otherwise."""
    first = found[0]
    if len(found) == 1 and (first.view.paths, first.view.rows) == (group.paths, group.rows):
        return dict(first.tensors)
    names = list_some([match.name for match in found])
    raise UserError(
        f"{group.name} is one {describe_kinds(first.kinds)} here, but the file divides its layers otherwise: {names}",
        code="adapter-layers-divided",
        fix="start from new values, and give the file with --frozen_lora or --base_weights, which take it as it is",
    )
