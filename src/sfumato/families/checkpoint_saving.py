"""Saves a model in the layout of its single file: trained weights from memory, all other tensors from the source."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfumato.diffusion.objective import Objective, VariancePreserving
from sfumato.errors import InternalError
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.foreign_keys import V_MARK, ZERO_SNR_MARK
from sfumato.families.source import Source
from sfumato.families.weights import Keep, Weights
from sfumato.formats.checkpoint import SAFETENSORS_DTYPES, Checkpoint
from sfumato.formats.checkpoint_writer import TensorSpec, write_stream
from sfumato.formats.keymap import KeyMap
from sfumato.formats.pickled import convert_to_pickle, is_pickled

SOURCE_METADATA = ("format", "sfumato.config")  # what reading the file needs; how it was made is not copied
EMA_PREFIX = "model_ema."  # of the EMA of the denoiser's weights in some checkpoints
ChangedWeights = Mapping[str, Collection[str]]  # network -> our names of the weights to take from memory
TensorEntries = Iterator[tuple[str, "TensorEntry"]]
WatchEntries = Callable[[Path, TensorEntries, torch.dtype | None], TensorEntries]  # file, its entries, dtype of all


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the output: its dtype and shape, and a function that makes it when it is written."""

    spec: TensorSpec
    make: Callable[[], Tensor]
    leader: str | None = None  # the key right after which it is made; None: in file order
    origins: tuple[tuple[Checkpoint, str], ...] = ()  # the tensors of files that it is made of: file and key


def save_single_file(
    model: Family,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    *,
    changed: ChangedWeights,
    from_memory: bool = False,
    watch: WatchEntries | None = None,
) -> None:
    """Write every key of the original file, tensor by tensor; the suffix of `path` is the format.

    The weights in `changed` come from memory, in their dtype there; everything else, e.g. the autoencoder, is copied
    byte for byte from the file it was loaded from. dtype: of all floating-point tensors. from_memory: the source files
    are gone, so keys of no network in memory are skipped; `changed` is that of `list_all_weights`. watch: sees each
    tensor before it is written.
    """
    source = model.blueprint.source
    kept = {} if source.is_folder else {k: v for k, v in source.file.header.metadata.items() if k in SOURCE_METADATA}
    entries, metadata = _iterate_single_file(model, changed, from_memory), {**kept, **metadata}
    entries = watch(path, entries, dtype) if watch else entries
    write_entries(path, entries, metadata, dtype)
    close_files(model.blueprint)


def save_network_file(
    model: Family,
    name: str,
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    changed: Collection[str],
    from_memory: bool = False,
) -> None:
    """Write the file of one network, tensor by tensor, with the keys that its file has under the network's prefix.

    The arguments are those of `save_single_file`, `changed` that of the network.
    """
    module, weights = model.parts[name].module, model.blueprint.networks[name].weights
    metadata = weights.file.header.metadata
    kept = {"format": "pt", **{key: value for key, value in metadata.items() if key in SOURCE_METADATA}}
    stored = [] if from_memory else iterate_stored(weights.file)
    own = [(key, entry) for key, entry in stored if key.startswith(weights.prefix)]
    names = frozenset(module.state_dict() if from_memory else changed)
    entries = iter([*own, *iterate_changed(model, name, names)])
    write_entries(path, entries, kept, dtype)
    weights.file.close()


def write_entries(path: Path, entries: TensorEntries, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Write a file of these entries, tensor by tensor; the last one of a key counts. The suffix is the format."""
    if is_pickled(path):
        with convert_to_pickle(path, metadata) as temporary:
            write_entries(temporary, entries, metadata, dtype)
        return
    by_key = dict(entries)
    specs = {
        key: (dtype if dtype and entry.spec[0].is_floating_point else entry.spec[0], entry.spec[1])
        for key, entry in by_key.items()
    }
    leaders = {key: entry.leader for key, entry in by_key.items() if entry.leader is not None}
    write_stream(path, specs, lambda key: by_key[key].make(), metadata, leaders=leaders)


def count_saved_bytes(
    blueprint: Blueprint,
    networks: Iterable[str],
    full_precision_parts: Collection[str],
    dtype: torch.dtype | None,
    trained: torch.dtype = torch.float32,
) -> int:
    """Bytes of the tensors that a save of these networks writes, from headers alone.

    trained: the dtype of the networks that train.
    """
    files: dict[int, Checkpoint] = {}
    for name in networks:
        file = blueprint.networks[name].weights.file
        files[id(file)] = file
    trained_keys: set[str] = set()
    for name in full_precision_parts:
        weights = blueprint.networks[name].weights
        trained_keys |= {weights.prefix + original for original in weights.original_keys()}
    total = 0
    for file in files.values():
        for key, info in file.header.tensors.items():
            stored = trained if key in trained_keys else SAFETENSORS_DTYPES[info.dtype]
            written = dtype if dtype and stored.is_floating_point else stored
            total += torch.Size(info.shape).numel() * written.itemsize
    return total


def list_saved_networks(blueprint: Blueprint) -> list[str]:
    """The networks that a saved model contains."""
    return [name for name in blueprint.networks if blueprint.in_file(name) or name in blueprint.checkpoint]


def find_ema_keys(source: Source) -> list[str]:
    """Keys of the EMA inside a checkpoint, which training makes outdated."""
    return [key for key in source.shapes if key.startswith(EMA_PREFIX)]


def list_all_weights(model: Family, networks: Iterable[str]) -> ChangedWeights:
    """All weights in memory of the networks that are saved, for a model whose source files are gone."""
    loaded = [name for name in networks if model.parts[name].is_loaded]
    return {name: model.parts[name].module.state_dict().keys() for name in loaded}


def close_files(blueprint: Blueprint) -> None:
    """Close the networks' files; they reopen by themselves."""
    for network in blueprint.networks.values():
        network.weights.file.close()


def _iterate_single_file(model: Family, changed: ChangedWeights, from_memory: bool) -> TensorEntries:
    blueprint = model.blueprint
    if not blueprint.source.is_folder and not from_memory:
        outdated = set(find_ema_keys(blueprint.source)) if changed.get("denoiser") else set()
        outdated |= {V_MARK, ZERO_SNR_MARK}
        yield from ((key, entry) for key, entry in iterate_stored(blueprint.source.file) if key not in outdated)
    for name in list_saved_networks(blueprint):
        if from_memory and name not in changed:
            continue
        network, names = blueprint.networks[name], frozenset(changed.get(name, ()))
        if not blueprint.source.is_folder and network.weights.file is blueprint.source.file:
            yield from iterate_changed(model, name, names)
        else:
            yield from iterate_converted(model, name, names, network.spec.key_prefix, network.spec.key_map)
    for mark in list_objective_marks(model.objective):
        yield mark, TensorEntry((torch.float32, (0,)), partial(torch.empty, 0))


def list_objective_marks(objective: Objective) -> list[str]:
    """The keys that say what the model predicts and how its noise ends, to programs that read the file."""
    if not isinstance(objective, VariancePreserving):
        return []
    return [V_MARK] * (objective.predicts == "v") + [ZERO_SNR_MARK] * objective.zero_terminal_snr


def iterate_stored(file: Checkpoint) -> TensorEntries:
    """Every tensor of a file, unchanged."""
    for key, info in file.header.tensors.items():
        spec = SAFETENSORS_DTYPES[info.dtype], info.shape
        yield key, TensorEntry(spec, partial(file.read, key), origins=((file, key),))


def iterate_pair(
    keys: tuple[str, str],
    specs: tuple[TensorSpec, TensorSpec],
    make: Callable[[], tuple[Tensor, Tensor]],
    origins: tuple[tuple[Checkpoint, str], ...],
) -> TensorEntries:
    """Two tensors that are made together, e.g. a weight in eight bits and its scales; the second is kept until the
    first is written."""
    kept: list[Tensor] = []

    def make_first() -> Tensor:
        first, second = make()
        kept.append(second)
        return first

    yield keys[0], TensorEntry(specs[0], make_first, origins=origins)
    yield keys[1], TensorEntry(specs[1], kept.pop, leader=keys[0], origins=origins)


def iterate_changed(model: Family, name: str, changed: frozenset[str]) -> TensorEntries:
    """The changed tensors of a network, under the keys of the file that it came from."""
    weights = model.blueprint.networks[name].weights
    originals: list[str] = []
    for original in weights.original_keys():
        ours = weights.key_map.find_ours(original)
        if ours and not changed.isdisjoint(ours[0]):
            originals.append(original)
    yield from _iterate_keys(model, name, changed, weights.prefix, weights.key_map, originals)
    state = model.parts[name].module.state_dict() if changed else {}
    for second, first in weights.tied.items():  # a copy in the file, whose key is the module's own name
        if first in changed and weights.prefix + second in weights.file.header.tensors:
            spec = (state[first].dtype, tuple(state[first].shape))
            yield weights.prefix + second, TensorEntry(spec, partial(model.parts[name].make_whole, first, state[first]))


def iterate_converted(model: Family, name: str, changed: frozenset[str], prefix: str, key_map: KeyMap) -> TensorEntries:
    """All tensors of a network, under the keys of another layout than that of its file."""
    shapes = model.blueprint.networks[name].weights.read_shapes()
    originals = dict.fromkeys(key_map.locate(ours).original for ours in shapes)
    yield from _iterate_keys(model, name, changed, prefix, key_map, originals)


def _iterate_keys(
    model: Family, name: str, changed: frozenset[str], prefix: str, key_map: KeyMap, originals: Iterable[str]
) -> TensorEntries:
    """Keys of a layout, each made of our weights in memory or in the network's file."""
    weights = model.blueprint.networks[name].weights
    state = model.parts[name].module.state_dict() if changed else {}
    make_whole = model.parts[name].make_whole
    for original in originals:
        ours = key_map.find_ours(original)
        if ours is None:
            raise InternalError(f"no rule of the key map covers {original!r}")
        in_memory = {name: state[name] for name in ours[0] if name in changed}
        in_file = tuple(name for name in ours[0] if name not in changed)
        like = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in in_memory.items()}
        like |= {name: weights.make_empty(name) for name in in_file}
        result = key_map.build(original, like)
        make = partial(_build_original, key_map, original, in_memory, in_file, weights, make_whole)
        spec = result.dtype, tuple(result.shape)
        yield prefix + original, TensorEntry(spec, make, origins=weights.list_origins(in_file))


def _build_original(
    key_map: KeyMap,
    original: str,
    in_memory: Mapping[str, Tensor],
    in_file: Collection[str],
    weights: Weights,
    make_whole: Keep,
) -> Tensor:
    """One original tensor, made of weights in memory and of unchanged ones in their file."""
    whole = {name: make_whole(name, tensor) for name, tensor in in_memory.items()}
    return key_map.build(original, {**whole, **{name: weights.read(name) for name in in_file}})


@dataclass(frozen=True)
class SourceFiles:
    """The files that saves copy from, with size and time when the model was loaded."""

    files: tuple[tuple[Path, int, int], ...]  # path, bytes, modification time in ns

    @classmethod
    def record(cls, blueprint: Blueprint, networks: Iterable[str]) -> SourceFiles:
        paths: set[Path] = set()
        for name in networks:
            paths.update(blueprint.networks[name].weights.file.paths())
        return cls(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)))

    def find_changed(self) -> list[Path]:
        """Files that are gone or have changed."""
        return [path for path, size, time in self.files if not _is_unchanged(path, size, time)]


def _is_unchanged(path: Path, size: int, time: int) -> bool:
    try:
        now = path.stat()
    except OSError:
        return False
    return (now.st_size, now.st_mtime_ns) == (size, time)
