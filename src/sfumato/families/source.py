"""The files of a model: single checkpoints and diffusers folders, found and described from their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sfumato.common.files import read_file
from sfumato.common.json_toml import decode_json
from sfumato.config import ModelOptions
from sfumato.errors import UserError
from sfumato.families._file_kinds import make_missing_error, option_context
from sfumato.families.cached_encoders import NO_CACHED_ENCODERS, CachedEncoders
from sfumato.families.hub_models import find_network_path, find_path
from sfumato.formats.checkpoint import Checkpoint, open_checkpoint
from sfumato.formats.shards import find_network_file

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
