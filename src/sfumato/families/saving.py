"""A model back into the single file it came from: what training changed from memory, everything else copied over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.families.base import Blueprint, Family, Network
from sfumato.families.source import Checkpoint, Source, Weights
from sfumato.formats.checkpoint import DTYPES, Spec, write_stream
from sfumato.formats.keymap import KeyMap
from sfumato.formats.pickled import is_pickled, repacked

KEPT = ("format", "sfumato.config")  # of the source's metadata: what reading it needs, nothing about how it was made
AVERAGE = "model_ema."  # where some checkpoints hold a running average of the denoiser's weights
Changed = Mapping[str, Collection[str]]  # network -> our names of the weights that are taken from memory
Entries = Iterator[tuple[str, "Entry"]]


@dataclass(frozen=True)
class Entry:
    """One tensor of the output: its type and shape, and how it is made when its turn comes."""

    spec: Spec
    make: Callable[[], Tensor]


def save_single_file(
    model: Family,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    *,
    changed: Changed,
    from_memory: bool = False,
) -> None:
    """Every key of the original file in its shape, written tensor by tensor; safetensors, or what `path` ends in.

    What `changed` names is taken from memory, in its own dtype there; everything else, the autoencoder and other
    networks included, comes byte for byte from the file it was loaded from. dtype: of all floating-point tensors.
    from_memory: the files have gone, so what belongs to no network is left out; `changed` is `everything`.
    """
    source = model.blueprint.source
    kept = {} if source.is_folder else {k: v for k, v in source.file.header.metadata.items() if k in KEPT}
    entries, said = _single_file(model, changed, from_memory), {**kept, **metadata}
    if is_pickled(path):
        with repacked(path, said) as place:
            write(place, entries, said, dtype)
    else:
        write(path, entries, said, dtype)
    close(model.blueprint)


def write(path: Path, entries: Entries, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """A file of these entries; where a key comes twice, the later one holds."""
    found = dict(entries)
    specs = {
        key: (dtype if dtype and entry.spec[0].is_floating_point else entry.spec[0], entry.spec[1])
        for key, entry in found.items()
    }
    write_stream(path, specs, lambda key: found[key].make(), metadata)


def size(
    blueprint: Blueprint, own_weights: Collection[str], dtype: torch.dtype | None, trained: torch.dtype = torch.float32
) -> int:
    """Bytes of the tensors that a save writes, from headers alone; `trained` is what trained networks are kept in."""
    total = 0
    files = {id(blueprint.networks[name].weights.file): blueprint.networks[name].weights for name in saved(blueprint)}
    live = {
        weights.prefix + original: trained
        for name in own_weights
        for weights in (blueprint.networks[name].weights,)
        for original in weights.originals()
    }
    for weights in files.values():
        for key, info in weights.file.header.tensors.items():
            kind = live.get(key, DTYPES[info.dtype])
            kind = dtype if dtype and kind.is_floating_point else kind
            total += torch.Size(info.shape).numel() * kind.itemsize
    return total


def saved(blueprint: Blueprint) -> list[str]:
    """The networks that a save of the model holds."""
    return [name for name in blueprint.networks if blueprint.in_file(name) or name in blueprint.checkpoint]


def averages(source: Source) -> list[str]:
    """Keys of the running average inside a checkpoint; it would be one of the model before training."""
    return [key for key in source.shapes if key.startswith(AVERAGE)]


def everything(model: Family) -> Changed:
    """For a model whose files have gone: all weights of the networks that are saved."""
    return {name: module_of(model, name).state_dict().keys() for name in saved(model.blueprint)}


def module_of(model: Family, name: str) -> nn.Module:
    return model.vae if name == "vae" else model.parts[name].module


def close(blueprint: Blueprint) -> None:
    """Files open again by themselves when something more is read."""
    for network in blueprint.networks.values():
        network.weights.file.close()


def _single_file(model: Family, changed: Changed, from_memory: bool) -> Entries:
    blueprint = model.blueprint
    if not blueprint.source.is_folder and not from_memory:
        outdated = set(averages(blueprint.source)) if changed.get("denoiser") else set()
        yield from ((key, entry) for key, entry in stored(blueprint.source.file) if key not in outdated)
    for name in saved(blueprint):
        network, names = blueprint.networks[name], frozenset(changed.get(name, ()))
        if not blueprint.source.is_folder and network.weights.file is blueprint.source.file:
            yield from renewed(model, name, names)
        else:
            yield from rewritten(model, name, names, network.spec.key_prefix, network.spec.key_map)


def stored(file: Checkpoint) -> Entries:
    """Every tensor of a file as it is."""
    for key, info in file.header.tensors.items():
        yield key, Entry((DTYPES[info.dtype], info.shape), partial(file.read, key))


def renewed(model: Family, name: str, changed: frozenset[str]) -> Entries:
    """What has changed of a network, under the keys of the file that it came from."""
    weights = model.blueprint.networks[name].weights
    found = ((original, weights.key_map.ours(original)) for original in weights.originals())
    touched = [original for original, ours in found if ours and not changed.isdisjoint(ours[0])]
    yield from _built(model, name, changed, weights.prefix, weights.key_map, touched)


def rewritten(model: Family, name: str, changed: frozenset[str], prefix: str, key_map: KeyMap) -> Entries:
    """A whole network in another layout than that of the file that it came from."""
    shapes = model.blueprint.networks[name].weights.shapes()
    originals = dict.fromkeys(key_map.locate(ours).original for ours in shapes)
    yield from _built(model, name, changed, prefix, key_map, originals)


def _built(
    model: Family, name: str, changed: frozenset[str], prefix: str, key_map: KeyMap, originals: Iterable[str]
) -> Entries:
    """Keys of a layout, each out of our weights in memory or in the network's file."""
    weights = model.blueprint.networks[name].weights
    state = module_of(model, name).state_dict() if changed else {}
    for original in originals:
        found = key_map.ours(original)
        assert found is not None, f"{original} belongs to the layout, so a rule covers it"
        live = {ours: state[ours] for ours in found[0] if ours in changed}
        still = tuple(ours for ours in found[0] if ours not in changed)
        like = {ours: tensor.to("meta") for ours, tensor in live.items()} | {o: weights.empty(o) for o in still}
        shaped = key_map.build(original, like)
        spec = (shaped.dtype, tuple(shaped.shape))
        yield prefix + original, Entry(spec, partial(_make, key_map, original, live, still, weights))


def _make(key_map: KeyMap, original: str, live: Mapping[str, Tensor], still: Collection[str], at: Weights) -> Tensor:
    """One original tensor: of weights in memory, and of those that lie unchanged in a file."""
    return key_map.build(original, {**live, **{ours: at.read(ours) for ours in still}})


@dataclass(frozen=True)
class Origin:
    """The files that saves copy from, as they were when the model was loaded."""

    files: tuple[tuple[Path, int, int], ...]  # path, size, time of the last change

    @classmethod
    def of(cls, blueprint: Blueprint) -> Origin:
        paths = {path for name in saved(blueprint) for path in _paths(blueprint.networks[name])}
        return cls(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)))

    def changed(self) -> list[Path]:
        """Those that are gone or no longer what they were."""
        return [path for path, size, time in self.files if not _is(path, size, time)]


def _paths(network: Network) -> list[Path]:
    """A network's file, or its shards."""
    return network.weights.file.paths()


def _is(path: Path, size: int, time: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (size, time)
