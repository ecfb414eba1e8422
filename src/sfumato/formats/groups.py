"""Layer groups: the layers behind one name of an adapter file, selected by patterns on a network's own names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from sfumato.errors import InternalError
from sfumato.formats.keymap import KeyMap, matches

Layer = nn.Linear | nn.Conv2d  # norm layers of any library, too, where `is_norm` says so
RowRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """The layers behind one name of an adapter file: same input, outputs stacked along rows."""

    name: str  # lora_unet_single_blocks_0_linear1
    part: str
    paths: tuple[str, ...]  # of the layers inside the part's module
    layers: tuple[Layer, ...]
    rows: tuple[RowRanges, ...]  # per layer: its row ranges in the stacked weight (two where halves swap)

    @property
    def num_rows(self) -> int:
        """Rows of the stacked weight."""
        return sum(stop - start for start, stop in chain.from_iterable(self.rows))

    @property
    def is_plain(self) -> bool:
        """Whether the group is one layer, with its rows in the file's order."""
        return len(self.rows) == 1 and len(self.rows[0]) == 1

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm layer, with one weight for each channel."""
        return self.layers[0].weight.ndim == 1

    def bind(self, layers: Mapping[str, Layer]) -> LayerGroup:
        """The same group of another module's layers, by their paths there."""
        return replace(self, layers=tuple(layers[path] for path in self.paths))

    def take_rows(self, stacked: Tensor, i: int) -> Tensor:
        """The rows of `stacked` that belong to the i-th layer."""
        pieces = [stacked[start:stop] for start, stop in self.rows[i]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def stack_rows(self, per_layer: Sequence[Tensor]) -> Tensor:
        """The inverse of `take_rows`: every layer's rows at their places in the stacked tensor."""
        first = per_layer[0]
        stacked = first.new_empty((self.num_rows, *first.shape[1:]))
        for ranges, rows in zip(self.rows, per_layer, strict=True):
            offset = 0
            for start, stop in ranges:
                stacked[start:stop] = rows[offset : offset + stop - start]
                offset += stop - start
        return stacked


def is_pointwise(layer: Layer) -> bool:
    """Whether sd-scripts counts the layer as "linear": linear layers and 1x1 convolutions; norm layers, too."""
    return not isinstance(layer, nn.Conv2d) or tuple(layer.kernel_size) == (1, 1)


def make_meta_layers(shapes: Mapping[str, Sequence[int]]) -> dict[str, Layer]:
    """Layers on the meta device from the shapes of weights and biases; with them a plan counts what a run trains."""
    layers: dict[str, Layer] = {}
    with warnings.catch_warnings():  # of layers without columns, which stand for those whose size no file tells
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        for name, shape in shapes.items():
            _add_meta_layer(layers, name, shape, shapes)
    return layers


def _add_meta_layer(
    layers: dict[str, Layer], name: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]
) -> None:
    path = name.removesuffix(".weight")
    has_bias = f"{path}.bias" in shapes
    if path != name and len(shape) == 2:
        layers[path] = nn.Linear(shape[1], shape[0], bias=has_bias, device="meta")
    elif path != name and len(shape) == 4:
        kernel = (shape[2], shape[3])
        layers[path] = nn.Conv2d(shape[1], shape[0], kernel, bias=has_bias, device="meta")
    elif path != name and len(shape) == 1:
        layers[path] = cast(Layer, nn.LayerNorm(shape[0], bias=has_bias, device="meta"))


def find_layers(module: nn.Module) -> dict[str, Layer]:
    """Linear layers, convolutions and norm layers, by their paths."""
    layers: dict[str, Layer] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layers[path] = layer
        elif is_norm(layer):
            layers[path] = cast(Layer, layer)
    return layers


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm layer with a weight, of whatever class: no other layer's weight has one dimension."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1


def group_layers(
    layers: Mapping[str, Layer], targets: Sequence[str], *, part: str, prefix: str, adapter_map: KeyMap
) -> list[LayerGroup]:
    """Group the layers that any target pattern matches by their name in adapter files, in the order of the names.

    Raises InternalError where the targets match only some of the layers that share a name.
    """
    alternatives = "|".join(targets)
    adapted = dict.fromkeys(path for path in layers if matches(alternatives, path))
    groups: dict[str, tuple[str, ...]] = {}
    swapped: set[str] = set()
    for path in adapted:
        location = adapter_map.locate(path)
        name = make_adapter_name(prefix, location.original)
        if not all(sibling in adapted for sibling in location.siblings):
            siblings = ", ".join(location.siblings)
            raise InternalError(f"{name} stands for {siblings}, but only some of them are adapted")
        if groups.setdefault(name, location.siblings) != location.siblings:
            raise InternalError(f"two different layers share the adapter name {name}")
        if location.op == "swap":
            swapped.add(name)
    return [_make_group(name, part, paths, layers, name in swapped) for name, paths in sorted(groups.items())]


def make_adapter_name(prefix: str, original: str) -> str:
    """A layer's name in adapter files."""
    return f"{prefix}_{original.replace('.', '_')}"


def _make_group(name: str, part: str, paths: tuple[str, ...], layers: Mapping[str, Layer], swap: bool) -> LayerGroup:
    found = tuple(layers[path] for path in paths)
    return LayerGroup(name, part, paths, found, make_row_ranges([len(layer.weight) for layer in found], swap=swap))


def make_row_ranges(heights: Sequence[int], *, swap: bool) -> tuple[RowRanges, ...]:
    """Per layer its rows in the stacked weight. heights: rows of each layer. swap: each layer's halves swap places."""
    ranges: list[RowRanges] = []
    start = 0
    for height in heights:
        stop = start + height
        middle = (start + stop) // 2
        ranges.append(((middle, stop), (start, middle)) if swap else ((start, stop),))
        start = stop
    return tuple(ranges)
