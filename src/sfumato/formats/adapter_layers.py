"""Which layers of a model an adapter file changes, whatever program named them, and the change of each layer group.

Programs differ in three ways: in the prefix of a network, in the layout of its names (the original's or diffusers'),
and in what shares one name (the original's fused `qkv` is three layers in diffusers). A view is the layers behind one
name in one layout; the adapters here belong to the groups of the layout that is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.adapter_file import AdapterFile, LayerTensors, check_whole_weights, make_unmatched_error
from sfumato.formats.adapter_keys import ALPHA, DOWN, UP
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
class LayerMatch:
    """One name of a file, the layers that it changes, in the rows of the file's layout, and its tensors."""

    name: str
    view: LayerGroup
    tensors: LayerTensors


@dataclass(frozen=True, eq=False)
class GroupAdapter:
    """What a file holds for one layer group: one LoRA of all its layers, or several, each of some of them."""

    group: LayerGroup
    matches: tuple[LayerMatch, ...]

    @property
    def is_joined(self) -> bool:
        """Whether the ranks of several LoRA stand side by side, each for its own layers."""
        return len(self.matches) > 1 and not self._shares_down

    @cached_property
    def _shares_down(self) -> bool:
        """Whether all have the same down matrix and scale: one LoRA whose up matrix was cut."""
        first, *others = self.matches
        return all(
            torch.equal(other.tensors[DOWN], first.tensors[DOWN])
            and torch.equal(other.tensors[ALPHA], first.tensors[ALPHA])
            for other in others
        )

    @property
    def rank(self) -> int:
        ranks = [len(match.tensors[DOWN]) for match in self.matches]
        return sum(ranks) if self.is_joined else ranks[0]

    def make_tensors(self) -> LayerTensors:
        """One LoRA of the whole group, which changes its layers as all of them do; exact."""
        first = self.matches[0]
        shape = self.group.layers[0].weight.shape[1:]
        if len(self.matches) == 1 and (first.view.paths, first.view.rows) == (self.group.paths, self.group.rows):
            return {DOWN: first.tensors[DOWN].reshape(-1, *shape), UP: first.tensors[UP], ALPHA: first.tensors[ALPHA]}
        if not self.is_joined:
            up = self._stack([_take_ups(match) for match in self.matches], len(first.tensors[DOWN]))
            return {DOWN: first.tensors[DOWN].reshape(-1, *shape), UP: up, ALPHA: first.tensors[ALPHA]}
        down = torch.cat([match.tensors[DOWN].float().reshape(-1, *shape) for match in self.matches])
        wide: list[dict[str, Tensor]] = []
        start = 0
        for match in self.matches:
            wide.append(_widen(match, start, len(down)))
            start += len(match.tensors[DOWN])
        return {DOWN: down, UP: self._stack(wide, len(down)), ALPHA: torch.tensor(float(len(down)))}

    def _stack(self, ups: Sequence[Mapping[str, Tensor]], rank: int) -> Tensor:
        """The up matrix of the group from those of its layers; 0 for layers that have none."""
        by_path: dict[str, Tensor] = {}
        for each in ups:
            by_path |= each
        like = next(iter(by_path.values()))
        pieces: list[Tensor] = []
        for path, layer in zip(self.group.paths, self.group.layers, strict=True):
            pieces.append(by_path[path] if path in by_path else like.new_zeros(len(layer.weight), rank))
        up = self.group.stack_rows(pieces)
        return up.reshape(*up.shape, *[1] * (self.group.layers[0].weight.ndim - 2))


def _take_ups(match: LayerMatch) -> dict[str, Tensor]:
    """Path of a layer -> its rows of the up matrix, (rows, rank)."""
    up = match.tensors[UP].flatten(1)
    return {path: match.view.take_rows(up, i) for i, path in enumerate(match.view.paths)}


def _widen(match: LayerMatch, start: int, rank: int) -> dict[str, Tensor]:
    """The same with the scale multiplied in, in columns from `start` of `rank`, and 0 in the others."""
    own = len(match.tensors[DOWN])
    scale = float(match.tensors[ALPHA]) / own
    wide: dict[str, Tensor] = {}
    for path, up in _take_ups(match).items():
        wide[path] = torch.zeros(len(up), rank)
        wide[path][:, start : start + own] = up.float() * scale
    return wide


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
            found.append(LayerMatch(name, _choose_view(file, name, tensors, views), tensors))
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


def _choose_view(file: AdapterFile, name: str, tensors: LayerTensors, views: Sequence[LayerGroup]) -> LayerGroup:
    """The only one of the views that the matrices have the size of."""
    suitable = [view for view in views if _has_size(view, tensors)]
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
        f"{file.path}: {name} has matrices of shape {tuple(tensors[DOWN].shape)} and {tuple(tensors[UP].shape)} for a "
        f"weight of shape {(views[0].num_rows, *weight.shape[1:])}: the file was made for another model",
        code="adapter-shape-mismatch",
        fix=file.describe_origin(),
    )


def _has_size(view: LayerGroup, tensors: LayerTensors) -> bool:
    down, up, weight = tensors[DOWN], tensors[UP], view.layers[0].weight
    return down.numel() == len(down) * weight[0].numel() and up.numel() == view.num_rows * len(down)


def collect_groups(found: Iterable[LayerMatch], groups: Iterable[LayerGroup]) -> Iterator[GroupAdapter]:
    """For each group that any match changes, in the order of the groups, its matches."""
    by_path: dict[tuple[str, str], LayerMatch] = {}
    for match in found:
        by_path |= {(match.view.part, path): match for path in match.view.paths}
    for group in groups:
        own = dict.fromkeys(by_path[key] for path in group.paths if (key := (group.part, path)) in by_path)
        if own:
            yield GroupAdapter(group, tuple(own))
