"""The layers behind one name of an adapter file, found by patterns on a network's own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats.keymap import KeyMap, pattern

Layer = nn.Linear | nn.Conv2d
Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """The layers behind one name of an adapter file: same input, outputs stacked along rows."""

    name: str  # lora_unet_single_blocks_0_linear1
    part: str
    paths: tuple[str, ...]  # of the layers inside the part's module
    layers: tuple[Layer, ...]
    rows: tuple[Rows, ...]  # per layer: its row ranges in the stacked weight (two where halves swap)

    @property
    def height(self) -> int:
        """Rows of the stacked weight."""
        return sum(stop - start for ranges in self.rows for start, stop in ranges)

    @property
    def is_plain(self) -> bool:
        """Whether one layer stands behind the name, with its rows in the file's order."""
        return len(self.rows) == 1 and len(self.rows[0]) == 1

    def take(self, stacked: Tensor, i: int) -> Tensor:
        """The rows of `stacked` that belong to the i-th layer."""
        pieces = [stacked[start:stop] for start, stop in self.rows[i]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def assemble(self, per_layer: Sequence[Tensor]) -> Tensor:
        """The inverse of `take`: every layer's rows at their places in the stacked tensor."""
        first = per_layer[0]
        stacked = first.new_empty((self.height, *first.shape[1:]))
        for ranges, rows in zip(self.rows, per_layer, strict=True):
            taken = 0
            for start, stop in ranges:
                stacked[start:stop] = rows[taken : taken + stop - start]
                taken += stop - start
        return stacked


def is_pointwise(layer: Layer) -> bool:
    """Linear layers and 1x1 convolutions: the field's "linear" kind."""
    return isinstance(layer, nn.Linear) or tuple(layer.kernel_size) == (1, 1)


def skeleton(shapes: Mapping[str, Sequence[int]]) -> dict[str, Layer]:
    """Layers without storage from weight shapes alone, so that a plan counts what a run would train."""
    layers: dict[str, Layer] = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path != name and len(shape) == 2:
            layers[path] = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        elif path != name and len(shape) == 4:
            kernel = (shape[2], shape[3])
            layers[path] = nn.Conv2d(shape[1], shape[0], kernel, bias=False, device="meta")
    return layers


def layers_of(module: nn.Module) -> dict[str, Layer]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def layer_groups(
    layers: Mapping[str, Layer], targets: Sequence[str], *, part: str, prefix: str, adapter_map: KeyMap
) -> list[LayerGroup]:
    """Group the layers that any target pattern matches by their name in adapter files, in the order of the names.

    Raises UserError where the targets catch only some of the layers that share a name.
    """
    wanted = [pattern(target) for target in targets]
    chosen = [path for path in layers if any(p.fullmatch(path) for p in wanted)]
    groups: dict[str, tuple[str, ...]] = {}
    swapped: set[str] = set()
    for path in chosen:
        place = adapter_map.locate(path)
        name = file_name(prefix, place.original)
        missing = [sibling for sibling in place.siblings if sibling not in layers]
        if missing or not set(place.siblings) <= set(chosen):
            raise UserError(f"{name} stands for {', '.join(place.siblings)}, but only some of them are adapted")
        if groups.setdefault(name, place.siblings) != place.siblings:
            raise UserError(f"two different layers share the adapter name {name}")
        if place.op == "swap":
            swapped.add(name)
    return [_group(name, part, paths, layers, name in swapped) for name, paths in sorted(groups.items())]


def file_name(prefix: str, original: str) -> str:
    """A layer's name in adapter files."""
    return f"{prefix}_{original.replace('.', '_')}"


def _group(name: str, part: str, paths: tuple[str, ...], layers: Mapping[str, Layer], swap: bool) -> LayerGroup:
    rows: list[Rows] = []
    start = 0
    for path in paths:
        stop = start + layers[path].weight.shape[0]
        middle = (start + stop) // 2
        rows.append(((middle, stop), (start, middle)) if swap else ((start, stop),))
        start = stop
    return LayerGroup(name, part, paths, tuple(layers[path] for path in paths), tuple(rows))
