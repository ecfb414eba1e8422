"""The files of a model: single checkpoints and diffusers folders, their headers and their weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.common.files import read_file
from sfumato.common.json_toml import decode_json
from sfumato.common.text import list_some
from sfumato.config import ModelOptions
from sfumato.errors import UserError
from sfumato.families._file_kinds import ShapeTable, make_missing_error, option_context
from sfumato.families.cached_encoders import NO_CACHED_ENCODERS, CachedEncoders
from sfumato.families.finite_check import FiniteCheck
from sfumato.families.foreign_keys import describe_passed_over, find_conflicts
from sfumato.families.hub_models import find_network_path, find_path
from sfumato.formats.checkpoint import SAFETENSORS_DTYPES, Checkpoint, HeaderFile, TensorFile, open_checkpoint
from sfumato.formats.keymap import KeyMap
from sfumato.formats.shards import find_network_file
from sfumato.quantization.weight import keep_in_format
from sfumato.quantization.weight_format import WeightFormat

log = logging.getLogger(__name__)
Shapes = dict[str, torch.Size]
Formats = Mapping[str, WeightFormat]  # our name of a weight -> how it is kept in memory
NO_FORMATS: Formats = {}
Keep = Callable[[str, torch.Tensor], torch.Tensor]  # our name and a tensor as it was read -> what stays in memory
MODEL_INDEX = "model_index.json"  # of a whole model in diffusers' layout
NOT_HERE = ("model-path-missing", "hub-model-unavailable")  # codes of errors about a path or name without a model


@dataclass(frozen=True)
class Source:
    """A checkpoint file or a folder in diffusers' layout."""

    path: Path
    hub_name: str = ""  # owner/name where the folder is in the hub's cache
    opened: Checkpoint | None = None  # what stands for the single file, where that is not read
    cached: CachedEncoders = NO_CACHED_ENCODERS  # what may stand for encoders that are not here

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.hub_name or self.path.name

    @cached_property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @cached_property
    def file(self) -> Checkpoint:
        """The single file. Raises UserError where it is missing or damaged."""
        return self.opened or open_checkpoint(self.path)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of the single file, {} for a folder."""
        if self.is_folder:
            return {}
        return {name: info.shape for name, info in self.file.header.tensors.items()}

    def find_prefix(self, *prefixes: str) -> str:
        """The first of the prefixes that keys of the single file start with, else an empty text."""
        return next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in self.shapes)), "")

    def strip_prefix(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Key without the prefix -> shape, for the keys of the single file that start with it."""
        return {key[len(prefix) :]: shape for key, shape in self.shapes.items() if key.startswith(prefix)}

    def read_config(self, network: str) -> dict[str, Any]:
        """A network's configuration: the folder's config.json, or the entry in the single file's metadata."""
        if not self.is_folder:
            return self._read_stored_config(network)
        return read_json(self.path / network / "config.json")

    def _read_stored_config(self, network: str) -> dict[str, Any]:
        try:
            configs = decode_json(self.file.header.metadata.get("sfumato.config", "{}"))
        except ValueError:
            configs = None
        config = configs.get(network, {}) if isinstance(configs, dict) else None
        if not isinstance(config, dict):
            raise UserError(
                f"{self.path}: the configurations in its metadata are damaged", code="checkpoint-config-damaged"
            )
        return config

    def open_lone(self) -> Checkpoint:
        """The weights of a source that is a single network: the file itself, or the folder's weight file."""
        return open_checkpoint(find_weight_file(self.path)) if self.is_folder else self.file

    def has_network(self, network: str) -> bool:
        """Whether this is a folder with one of this name for the network."""
        return self.is_folder and (self.path / network / "config.json").is_file()

    def find_inner(self, network: str) -> str:
        """The folder of this name; "." where there is none, since this is the network's own folder."""
        return network if self.has_network(network) else "."

    def find_cached(self, part: str) -> Source | None:
        """What stands for an encoder that is not here and whose outputs are cached; None where nothing does.

        Raises UserError where the cache knows several.
        """
        record = self.cached.find(part)
        return Source(record.folder) if record else None

    def open_weights(self, network: str) -> Checkpoint:
        """The weights of one network inside the folder."""
        return open_checkpoint(find_weight_file(self.path / network))


def open_source(model: ModelOptions) -> Source:
    """The checkpoint that the options name. Raises UserError where they name none or it does not exist."""
    if model.pretrained_model_name_or_path is None:
        raise UserError(
            "no base model is given",
            code="base-model-missing",
            fix="--pretrained_model_name_or_path FILE_OR_FOLDER",
        )
    name = model.pretrained_model_name_or_path
    path = find_path(name)
    return Source(path, hub_name="" if Path(name).exists() else name)


def find_component(source: Source, part: str, option: str, given: str | None, folder: str, *prefixes: str) -> Source:
    """The file or folder of a network: what its option names, else the folder in a diffusers model.

    Else the checkpoint itself where it has keys with one of `prefixes`, else what stands for it because its outputs
    are cached. Raises UserError where there is none.
    """
    if given:
        with option_context(option):
            return find_given(source, part, given)
    found = find_present(source, option, given, folder, *prefixes) or source.find_cached(part)
    if found is None:
        raise make_missing_error(option, source.path)
    return found


def find_present(source: Source, option: str, given: str | None, folder: str, *prefixes: str) -> Source | None:
    """The same where the weights themselves are wanted; None where the network is in no file."""
    if given:
        with option_context(option):
            return Source(find_network_path(given))
    if source.has_network(folder):
        return Source(source.path / folder)
    return source if source.find_prefix(*prefixes) else None


def find_given(source: Source, part: str, given: str) -> Source:
    """The file or folder that an option names for an encoder; where it is not here, what stands for it.

    Raises UserError where there is neither.
    """
    try:
        return Source(find_network_path(given))
    except UserError as error:
        cached = source.find_cached(part) if error.code in NOT_HERE else None
        if cached is None:
            raise
        return cached


def find_weight_file(folder: Path) -> Path:
    """The weight file of a network saved by diffusers or transformers, else the only safetensors file.

    Raises UserError where there is none.
    """
    lone = list(folder.glob("*.safetensors"))
    found = find_network_file(folder) or (lone[0] if len(lone) == 1 else None)
    if found is None:
        raise UserError(
            f"{folder} holds no .safetensors or .bin weights of diffusers or transformers",
            code="network-folder-without-weights",
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is missing, is not valid JSON or holds no object."""
    try:
        content = decode_json(read_file(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", code="model-config-missing") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})", code="model-json-invalid") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object", code="model-json-no-object")
    return content


def select_fields(config: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The given fields of a published config.json, where it has them."""
    return {name: config[name] for name in fields if name in config}


def drop_private_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of diffusers without the entries about itself, e.g. _class_name."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of one network inside a file, and the key map from their keys to the module's names."""

    file: Checkpoint
    key_map: KeyMap
    prefix: str = ""
    row_split: Callable[[str, Sequence[int]], Sequence[int]] | None = None  # PartSpec.row_split
    tied: Mapping[str, str] = field(default_factory=dict)  # our name -> the name whose tensor it shares

    def original_keys(self) -> Iterator[str]:
        """Keys without the prefix, except those that the key map drops."""
        for key in self.file.header.tensors:
            if key.startswith(self.prefix) and not self.key_map.is_dropped(key[len(self.prefix) :]):
                yield key[len(self.prefix) :]

    def read_shapes(self) -> Shapes:
        """Our name -> shape, from the header alone.

        Raises UserError for keys that no rule covers and that belong to the network's layers; looking up a name that
        is missing raises one, too.
        """
        return self._shapes

    @cached_property
    def _shapes(self) -> Shapes:
        shapes: Shapes = {}
        known: list[str] = []
        unknown: list[str] = []
        for original in self.original_keys():
            ours = self.key_map.find_ours(original)
            if ours is None:
                unknown.append(original)
                continue
            known.append(original)
            names, op = ours
            shape = torch.Size(self.file.header.tensors[self.prefix + original].shape)
            if not shape:
                continue
            if op == "squeeze":
                shape = shape[:2]
            if op == "transpose":
                shape = shape[::-1]
            rows = [shape[0]] if len(names) == 1 else self._split_rows(original, shape, len(names))
            shapes |= {name: torch.Size((n, *shape[1:])) for name, n in zip(names, rows, strict=True)}
        conflicts = find_conflicts(unknown, known) if unknown else []
        if conflicts:
            raise UserError(
                f"{self.file.header.path} has {len(conflicts)} unknown keys: {list_some(conflicts)}",
                code="network-keys-unknown",
            )
        return ShapeTable(self.file.header.path, shapes)

    @cached_property
    def stored_keys(self) -> dict[str, str]:
        """Our name -> the key without prefix of its tensor, which may be stacked with others."""
        keys: dict[str, str] = {}
        for original in self.original_keys():
            ours = self.key_map.find_ours(original)
            keys |= dict.fromkeys(ours[0], original) if ours else {}
        return keys

    def list_used_keys(self) -> Iterator[str]:
        """Keys of the file that belong to the network, the redundant ones included."""
        for key in self.file.header.tensors:
            original = key.removeprefix(self.prefix)
            if key.startswith(self.prefix) and (self.key_map.is_redundant(original) or (original in self._originals)):
                yield key

    @cached_property
    def _originals(self) -> frozenset[str]:
        return frozenset(self.stored_keys.values())

    def make_empty(self, name: str) -> torch.Tensor:
        """A tensor on the meta device with the dtype and shape that one of our names has in the file."""
        stored = self.file.header.tensors[self.prefix + self.stored_keys[name]]
        return torch.empty(self.read_shapes()[name], dtype=SAFETENSORS_DTYPES[stored.dtype], device="meta")

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of one of our names; floating-point ones as `dtype`, None: as in the file."""
        name = self.tied.get(name, name)
        original = self.stored_keys[name]
        tensor = self.file.read(self.prefix + original, dtype=dtype)
        return next(piece for ours, piece in self.key_map.split(original, tensor, self._shapes) if ours == name)

    def list_origins(self, names: Iterable[str]) -> tuple[tuple[Checkpoint, str], ...]:
        """The file and the keys of the tensors that some of our names are read from."""
        originals = dict.fromkeys(self.stored_keys[self.tied.get(name, name)] for name in names)
        return tuple((self.file, self.prefix + original) for original in originals)

    def _split_rows(self, original: str, shape: torch.Size, count: int) -> Sequence[int]:
        if self.row_split is not None:
            return self.row_split(original, shape)
        return [shape[0] // count] * count

    def fill_module(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device,
        formats: Formats = NO_FORMATS,
        on_host: tuple[str, ...] = (),
        mapped: bool = False,
        keep: Keep | None = None,
    ) -> None:
        """Read the file's tensors one at a time into a module on the meta device.

        formats: of those weights that are kept in fewer bits, by our name; of each there is a whole copy only while it
        is read. on_host: what the names start with of those that stay in main memory, whatever the device; mapped: they
        look into the file where it has them in the wanted dtype. keep: what stays of each tensor. Raises UserError
        where the file lacks tensors, has further ones, or one has another shape.
        """
        expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
        self._pass_over_foreign(expected)
        state: dict[str, torch.Tensor] = {}
        finite = FiniteCheck(self.file.header.path, dtype)
        has_numbers = bool(self.file.paths())
        for original in self.original_keys():
            names = self.key_map.find_ours(original)
            if names is None or not set(names[0]) <= set(expected):
                continue
            is_hosted = names[0][0].startswith(on_host)
            if mapped and is_hosted and self.can_map(original, dtype):
                tensor = self._map(original)
            else:
                place = torch.device("cpu") if is_hosted else device
                tensor = self._read_any(original, dtype, place, stored=set(names[0]) <= formats.keys())
            if has_numbers:  # else nothing is read, and there are none to look at
                largest = min(formats[name].largest if name in formats else math.inf for name in names[0])
                finite.add(self.prefix + original, tensor, largest)
            for name, piece in self.key_map.split(original, tensor, expected):
                if piece.shape != expected[name]:
                    raise UserError(
                        f"{self.file.header.path}: {self.prefix + original} has shape {tuple(piece.shape)}, "
                        f"expected {tuple(expected[name])}",
                        code="network-shape-mismatch",
                    )
                kept = keep_in_format(piece, formats[name]) if name in formats else piece
                state[name] = kept if keep is None else keep(name, kept)
        state |= {name: state[other] for name, other in self.tied.items() if name in expected and other in state}
        missing = [name for name in expected if name not in state]
        if missing:
            raise UserError(
                f"{self.file.header.path} lacks {len(missing)} tensors: {list_some(missing)}",
                code="network-tensors-missing",
            )
        finite.finish(self.file)
        module.load_state_dict(state, assign=True)
        for name, other in self.tied.items():  # which assigning makes two parameters of
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, module.get_parameter(other))

    @property
    def has_formats(self) -> bool:
        """Whether the file has any of the network's weights in fewer bits."""
        return any(self.file.find_format(self.prefix + key) is not None for key in self.original_keys())

    def find_format(self, name: str) -> WeightFormat | None:
        """In which format of fewer bits the file has the weight of one of our names; None where in none."""
        return self.file.find_format(self.prefix + self.stored_keys[name]) if name in self.stored_keys else None

    def can_map(self, original: str, dtype: torch.dtype) -> bool:
        """Whether a tensor can look into the file: it has it as `dtype`, and by itself."""
        key = self.prefix + original
        is_plain = isinstance(self.file, TensorFile | HeaderFile) and self.file.find_format(key) is None
        return is_plain and SAFETENSORS_DTYPES[self.file.header.tensors[key].dtype] == dtype

    def _map(self, original: str) -> torch.Tensor:
        assert isinstance(self.file, TensorFile | HeaderFile)
        return self.file.map_tensor(self.prefix + original)

    def _read_any(self, original: str, dtype: torch.dtype, device: torch.device, *, stored: bool) -> torch.Tensor:
        """A tensor of the file; one in fewer bits as it is `stored`, where that is kept."""
        key = self.prefix + original
        if stored and self.file.find_format(key) is not None:
            return self.file.read_stored(key, dtype=dtype, device=device)
        return self.file.read(key, dtype=dtype, device=device)

    def _pass_over_foreign(self, expected: Mapping[str, torch.Size]) -> None:
        """Log keys of no place in the module; UserError for those of further blocks, and of layers that it has."""
        self.read_shapes()  # raises it for keys that no rule covers
        foreign = [name for name in self.stored_keys if name not in expected]
        conflicts = find_conflicts(foreign, expected)
        if conflicts:
            raise UserError(
                f"{self.file.header.path}: the network has no tensor for {list_some(conflicts)}",
                code="network-key-unexpected",
            )
        if foreign:
            log.info("note: %s", describe_passed_over(self.file.header.path, foreign))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network with its parameters on the meta device and its buffers in memory, without initialization."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), without_initialization():
        return build()


@contextmanager
def without_initialization() -> Iterator[None]:
    """Layers draw no first numbers: on the meta device that is a quarter of the time of building a network."""
    initialized: tuple[Any, ...] = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
    usual = {layer: layer.reset_parameters for layer in initialized}
    try:
        for layer in initialized:
            layer.reset_parameters = lambda _: None
        yield
    finally:
        for layer, reset in usual.items():
            layer.reset_parameters = reset
