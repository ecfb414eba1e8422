"""A model back into the single file it came from: what training changed from memory, everything else copied over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfumato.families._source import Source, Weights
from sfumato.families.base import Family
from sfumato.formats.checkpoint import DTYPES, Spec, write_stream
from sfumato.formats.keymap import KeyMap

KEPT = ("format", "sfumato.config")  # of the source's metadata: what reading it needs, nothing about how it was made
AVERAGE = "model_ema."  # where some checkpoints hold a running average of the denoiser's weights
Changed = Mapping[str, Collection[str]]  # part -> our names of the weights on which memory and file differ


@dataclass(frozen=True)
class Entry:
    """One tensor of the output: its type and shape, and how it is made when its turn comes."""

    spec: Spec
    make: Callable[[], Tensor]


def save_single_file(
    model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None = None, *, changed: Changed
) -> None:
    """Every key of the original file in its shape, written tensor by tensor.

    What `changed` names is taken from memory, in its own dtype there; everything else, the autoencoder and other
    networks included, comes byte for byte from the file it was loaded from. dtype: of all floating-point tensors.
    """
    source = model.blueprint.source
    kept = {} if source.is_folder else {k: v for k, v in source.file.header.metadata.items() if k in KEPT}
    found = dict(_entries(model, changed))
    write_stream(
        path,
        {key: (dtype if dtype and entry.spec[0].is_floating_point else entry.spec[0], entry.spec[1])
         for key, entry in found.items()},
        lambda key: found[key].make(),
        {**kept, **metadata},
    )  # fmt: skip
    for network in model.blueprint.networks.values():
        network.weights.file.close()


def averages(source: Source) -> list[str]:
    """Keys of the running average inside a checkpoint; it would be one of the model before training."""
    return [key for key in source.shapes if key.startswith(AVERAGE)]


def _entries(model: Family, changed: Changed) -> Iterator[tuple[str, Entry]]:
    """(key, entry) of the single file; where a key comes twice, the later entry holds."""
    blueprint = model.blueprint
    if not blueprint.source.is_folder:
        file = blueprint.source.file
        outdated = averages(blueprint.source) if changed.get("denoiser") else ()
        for key in file.header.tensors.keys() - set(outdated):
            info = file.header.tensors[key]
            yield key, Entry((DTYPES[info.dtype], info.shape), partial(file.read, key))
    for name in blueprint.networks:
        if blueprint.in_file(name) or name in blueprint.checkpoint:
            yield from _network_entries(model, name, frozenset(changed.get(name, ())))


def _network_entries(model: Family, name: str, changed: frozenset[str]) -> Iterator[tuple[str, Entry]]:
    """A network's keys as the single file spells them, without those that lie there as they are."""
    blueprint, network = model.blueprint, model.blueprint.networks[name]
    weights = network.weights
    here = not blueprint.source.is_folder and weights.file is blueprint.source.file
    if here:
        prefix, key_map, originals = weights.prefix, weights.key_map, list(weights.originals())
    else:
        prefix, key_map = network.spec.key_prefix, network.spec.key_map
        originals = list(dict.fromkeys(key_map.locate(ours).original for ours in weights.shapes()))
    state = model.parts[name].module.state_dict() if changed else {}
    for original in originals:
        found = key_map.ours(original)
        assert found is not None, f"{original} is in the file, so a rule covers it"
        if here and changed.isdisjoint(found[0]):
            continue
        live = {ours: state[ours] for ours in found[0] if ours in changed}
        still = tuple(ours for ours in found[0] if ours not in changed)
        like = {ours: tensor.to("meta") for ours, tensor in live.items()} | {o: weights.empty(o) for o in still}
        shaped = key_map.build(original, like)
        spec = (shaped.dtype, tuple(shaped.shape))
        yield prefix + original, Entry(spec, partial(_make, key_map, original, live, still, weights))


def _make(key_map: KeyMap, original: str, live: Mapping[str, Tensor], still: Collection[str], at: Weights) -> Tensor:
    """One original tensor: of weights in memory, and of those that lie unchanged in a file."""
    return key_map.build(original, {**live, **{ours: at.read(ours) for ours in still}})
