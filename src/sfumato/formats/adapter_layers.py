"""Which layers of a model an adapter file changes, whatever program named them, and the change of each layer group.

Programs differ in three ways: in the prefix of a network, in the layout of its names (the original's or diffusers'),
and in what shares one name (the original's fused `qkv` is three layers in diffusers). A view is the layers behind one
name in one layout; the adapters here belong to the groups of the layout that is written.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sfumato.errors import UserError
from sfumato.formats.adapter_file import AdapterFile, check_whole_weights, make_unmatched_error
from sfumato.formats.adapter_kind import Kinds, LayerMatch, LayerTensors, describe_kinds
from sfumato.formats.groups import Layer, LayerGroup, make_row_ranges
from sfumato.formats.keymap import KeyMap, matches

Views = dict[str, LayerGroup]  # original name with _ for dots -> its layers


def make_views(layers: Mapping[str, Layer], targets: Sequence[str], *, part: str, layouts: Iterable[KeyMap]) -> Views:
    """The adaptable ones of these layers under their names in every layout; where layouts clash, the first counts."""
    alternatives = "|".join(targets)
    adaptable = [path for path in layers if matches(alternatives, path)]
    views: Views = {}
    for layout in layouts:
        for path in adaptable:
            location = layout.find_original(path)
            if location is None or location.op == "transpose" or not all(each in layers for each in location.siblings):
                continue
            name = location.original.replace(".", "_")
            if name not in views:
                found = tuple(layers[each] for each in location.siblings)
                rows = make_row_ranges([len(layer.weight) for layer in found], swap=location.op == "swap")
                views[name] = LayerGroup(name, part, location.siblings, found, rows)
    return views


class LayerTable:
    """The layers of a model by every name that adapter files have for them."""

    def __init__(self) -> None:
        self._parts: list[tuple[tuple[str, ...], Views]] = []

    def add_part(self, prefixes: Iterable[str], views: Views) -> None:
        """prefixes: what may stand before the names of the part's layers; "" where nothing does."""
        self._parts.append((tuple(prefix.replace(".", "_") for prefix in prefixes), views))

    def find(self, name: str) -> list[LayerGroup]:
        """The layers of a name; several where parts share it. The longest prefix counts."""
        flat = name.replace(".", "_")
        found: dict[int, list[LayerGroup]] = defaultdict(list)
        for prefixes, views in self._parts:
            for prefix in prefixes:
                rest = flat.removeprefix(f"{prefix}_") if prefix else flat
                if (rest != flat or not prefix) and rest in views:
                    found[len(prefix)].append(views[rest])
        return found[max(found)] if found else []


@dataclass(frozen=True, eq=False)
class GroupAdapter:
    """What a file holds for one layer group: one adapter of all its layers, or several, each of some of them."""

    group: LayerGroup
    matches: tuple[LayerMatch, ...]

    @property
    def kinds(self) -> Kinds:
        return self.matches[0].kinds

    def make_tensors(self) -> LayerTensors:
        """One adapter of the whole group, which changes its layers as all of them do; UserError where none does."""
        mixed = next((match for match in self.matches if match.kinds != self.kinds), None)
        if mixed:
            raise UserError(
                f"{self.group.name} is one adapter here, but the file has {describe_kinds(self.kinds)} and "
                f"{describe_kinds(mixed.kinds)} for its layers",
                code="adapter-kinds-mixed",
            )
        tensors: LayerTensors = {}
        for kind in reversed(self.kinds):
            tensors |= kind.join(self.group, self.matches)
        return tensors


def match_layers(file: AdapterFile, table: LayerTable, *, other_models: Iterable[str] = ()) -> list[LayerMatch]:
    """Every name of the file with its layers.

    other_models: computed only for the error; models that have the names of the file.
    Raises UserError for names of no layer, matrices of another size than the layer's, and layers under two names.
    """
    unmatched: list[str] = []
    found: list[LayerMatch] = []
    for name, tensors in file.layers.items():
        views = table.find(name)
        if views:
            found.append(LayerMatch(name, _choose_view(file, name, views), file.kinds[name], tensors))
        else:
            unmatched.append(name)
    if unmatched:
        raise make_unmatched_error(file, unmatched, other_models)
    check_whole_weights(file.path, [key for key in file.passed_over if table.find(key.rpartition(".")[0])])
    names: dict[tuple[str, str], str] = {}
    for match in found:
        for path in match.view.paths:
            other = names.setdefault((match.view.part, path), match.name)
            if other != match.name:
                raise UserError(
                    f"{file.path} holds two changes of the layer {path}: {other} and {match.name}",
                    code="adapter-layer-twice",
                )
    return found


def _choose_view(file: AdapterFile, name: str, views: Sequence[LayerGroup]) -> LayerGroup:
    """The only one of the views that the matrices have the size of."""
    shape = file.find_weight_shape(name)
    suitable = [view for view in views if _has_size(view, shape)]
    if len(suitable) == 1:
        return suitable[0]
    if suitable:
        parts = ", ".join(view.part for view in suitable)
        raise UserError(
            f"{file.path}: {name} is a layer of several parts of this model ({parts})",
            code="adapter-part-ambiguous",
            fix="use a file whose names start with the part, e.g. text_encoder_2. or lora_te2_",
        )
    weight = views[0].layers[0].weight
    raise UserError(
        f"{file.path}: {name} changes a weight of shape {shape}, where the model has one of shape "
        f"{(views[0].num_rows, *weight.shape[1:])}: the file was made for another model",
        code="adapter-shape-mismatch",
        fix=file.describe_origin(),
    )


def _has_size(view: LayerGroup, shape: Sequence[int]) -> bool:
    """Whether the view's weight has as many rows and columns; kernels may be flattened in files, 0 is any number."""
    weight = view.layers[0].weight
    return shape[0] in (0, view.num_rows) and math.prod(shape[1:]) in (0, math.prod(weight.shape[1:]))


def collect_groups(found: Iterable[LayerMatch], groups: Iterable[LayerGroup]) -> Iterator[GroupAdapter]:
    """For each group that any match changes, in the order of the groups, its matches."""
    by_path: dict[tuple[str, str], LayerMatch] = {}
    for match in found:
        by_path |= {(match.view.part, path): match for path in match.view.paths}
    for group in groups:
        own = dict.fromkeys(by_path[key] for path in group.paths if (key := (group.part, path)) in by_path)
        if own:
            yield GroupAdapter(group, tuple(own))
