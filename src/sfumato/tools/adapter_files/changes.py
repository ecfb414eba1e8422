"""What adapters change in the tensors of a checkpoint: each tensor is read, changed in float32, and rounded once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter
from sfumato.adapters.kinds import get_class, restore_adapter
from sfumato.adapters.low_rank import Factors
from sfumato.families.checkpoint_saving import TensorEntries, TensorEntry, iterate_pair, iterate_stored
from sfumato.families.part import Network
from sfumato.formats.adapter_kind import LayerMatch
from sfumato.formats.checkpoint import SAFETENSORS_DTYPES, Checkpoint
from sfumato.formats.groups import Layer
from sfumato.formats.scaled import ScaledFile, divide_by_scale


class Strong(NamedTuple):
    """One name of an adapter file, and how much of its change counts."""

    match: LayerMatch
    strength: float


@dataclass(frozen=True, kw_only=True)
class TensorChange:
    """A tensor of a network's file, and the adapters that change it."""

    network: Network
    original: str  # its key without the network's prefix
    adapters: list[Strong] = field(default_factory=list)

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The changed tensor in float32, in the layout of the file. Every change is that of the unchanged model."""
        weights = self.network.weights
        stored = weights.file.read(weights.prefix + self.original, dtype=torch.float32)
        ours = weights.key_map.find_ours(self.original)
        assert ours is not None
        pieces = dict(weights.key_map.split(self.original, stored, weights.read_shapes()))
        before = {name: piece.clone() for name, piece in pieces.items()} if self._reads_weights() else {}
        for name, piece in pieces.items():
            self._change(name, piece, before)
        is_view = ours[1] in ("", "squeeze")
        return stored if is_view else weights.key_map.build(self.original, pieces)

    def _reads_weights(self) -> bool:
        return any(get_class(kind).reads_weights for adapter in self.adapters for kind in adapter.match.kinds)

    def _change(self, name: str, piece: Tensor, before: Mapping[str, Tensor]) -> None:
        """Add all changes to one of our tensors, in place."""
        path, _, parameter = name.rpartition(".")
        for match, strength in self.adapters:
            if path not in match.view.paths:
                continue
            i = match.view.paths.index(path)
            factors = find_low_rank(match)
            if parameter == "bias":
                bias = restore_on(match, before, self.network).bias_delta(i)
                if bias is not None:
                    piece.add_(bias, alpha=strength)
            elif factors:
                up = match.view.take_rows(factors.up, i)
                flat = piece.flatten(1)
                assert flat.data_ptr() == piece.data_ptr(), "changed in place"
                flat.addmm_(up, factors.down, alpha=strength)
            else:
                piece.add_(restore_on(match, before, self.network).delta(i), alpha=strength)


def find_low_rank(match: LayerMatch) -> Factors | None:
    """The low-rank factors of a change; None where it is none of low rank, or of a wrapper."""
    found = get_class(match.kinds[-1]).to_factors(match.tensors) if len(match.kinds) == 1 else None
    return Factors(*found) if found else None


def restore_on(match: LayerMatch, known: Mapping[str, Tensor], network: Network | None) -> Adapter:
    """The adapter of a match, whose layers hold the weights where it reads them, else zeros that take no memory.

    known: our name -> weight, of some of them; the others are read from the network's file. Without a network, layers
    have the biases that the adapter changes.
    """
    reads = any(get_class(kind).reads_weights for kind in match.kinds)
    layers: dict[str, Layer] = {}
    for path, layer in zip(match.view.paths, match.view.layers, strict=True):
        name = f"{path}.weight"
        if not reads:
            weight = torch.zeros(()).expand(layer.weight.shape)
        elif name in known:
            weight = known[name]
        else:
            assert network is not None, "callers give it where weights are read"
            weight = network.weights.read(name, dtype=torch.float32)
        layers[path] = hold_weight(layer, weight)
        if network is None and any(get_class(kind).changes_biases for kind in match.kinds):
            bias = torch.zeros(()).expand(len(layer.weight))
            layers[path]._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return restore_adapter(match.kinds, match.view.bind(layers), match.tensors)


def hold_weight(layer: Layer, weight: Tensor) -> Layer:
    """A copy of a layer on the meta device with this weight."""
    copied = copy.copy(layer)
    copied._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return copied


def plan_changes(networks: Mapping[str, Network], adapters: Iterable[Strong]) -> dict[int, dict[str, TensorChange]]:
    """id of a file -> key -> what changes there. Every part of the adapters is among the networks."""
    planned: dict[int, dict[str, TensorChange]] = {}
    for adapter in adapters:
        network = networks[adapter.match.view.part]
        changes_biases = any(get_class(kind).changes_biases for kind in adapter.match.kinds)
        for path in adapter.match.view.paths:
            for parameter in ("weight", "bias") if changes_biases else ("weight",):
                original = network.weights.stored_keys.get(f"{path}.{parameter}")
                if original is None:
                    continue
                own = planned.setdefault(id(network.weights.file), {})
                key = network.weights.prefix + original
                change = own.setdefault(key, TensorChange(network=network, original=original))
                if adapter not in change.adapters:
                    change.adapters.append(adapter)
    return planned


def iterate_changed_file(
    file: Checkpoint, changes: Mapping[str, TensorChange], dtype: torch.dtype | None
) -> TensorEntries:
    """Every tensor of a file; those without a change are read and written as they are.

    dtype: None keeps the format of each tensor, a scale beside weights in eight bits included.
    """
    scaled = file if isinstance(file, ScaledFile) and dtype is None else None
    raw = scaled.inner if scaled else file
    yield from iterate_stored(raw)
    for key, change in changes.items():
        info = raw.header.tensors[key]
        spec = (SAFETENSORS_DTYPES[info.dtype], info.shape)
        scale_key = scaled.find_scale(key) if scaled else None
        if scaled is None or scale_key is None:
            yield key, TensorEntry(spec, change.compute, origins=((raw, key),))
            continue
        scale = raw.header.tensors[scale_key]
        specs = spec, (SAFETENSORS_DTYPES[scale.dtype], scale.shape)
        make = partial(_round_with_scale, change, spec[0], scale.shape, scaled.find_rotation(key))
        yield from iterate_pair((key, scale_key), specs, make, ((raw, key), (raw, scale_key)))


def _round_with_scale(
    change: TensorChange, dtype: torch.dtype, scale_shape: Sequence[int], rotation: int
) -> tuple[Tensor, Tensor]:
    return divide_by_scale(change.compute(), dtype, scale_shape, rotation=rotation)
