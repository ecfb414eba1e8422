"""Where a model's weights come from: single files and diffusers folders, seen through their headers first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.config import ModelOptions
from sfumato.errors import UserError
from sfumato.families._file_kinds import Found
from sfumato.formats.checkpoint import DTYPES, PickledFile, TensorFile, open_checkpoint
from sfumato.formats.keymap import KeyMap

Shapes = dict[str, torch.Size]
Checkpoint = TensorFile | PickledFile
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")  # folders, no lone checkpoints
HUB_VARIANTS = ("*.fp16.*", "*.non_ema.*", "safety_checker/*")


@dataclass(frozen=True)
class Source:
    """What the user pointed at: one checkpoint file, or a folder in diffusers' layout."""

    path: Path
    hub_name: str = ""  # owner/name, when the folder is the hub's cache

    @property
    def name(self) -> str:
        """What to call it in reports."""
        return self.hub_name or self.path.name

    @cached_property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @cached_property
    def file(self) -> Checkpoint:
        """The single file; raises UserError when it is missing or broken."""
        return open_checkpoint(self.path)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of the single file, {} for a folder."""
        if self.is_folder:
            return {}
        return {name: info.shape for name, info in self.file.header.tensors.items()}

    def config(self, network: str) -> dict[str, Any]:
        """A network's configuration: the folder's config.json, or what the single file's metadata says of it."""
        if not self.is_folder:
            return json.loads(self.file.header.metadata.get("sfumato.config", "{}")).get(network, {})
        return read_json(self.path / network / "config.json")

    def component(self) -> Checkpoint:
        """The weights when the source is a single network: the file itself, or the folder's weight file."""
        return open_checkpoint(weight_file(self.path)) if self.is_folder else self.file

    def has(self, network: str) -> bool:
        return self.is_folder and (self.path / network / "config.json").is_file()

    def weights(self, network: str) -> Checkpoint:
        """The weights of one network inside the folder."""
        return open_checkpoint(weight_file(self.path / network))


def open_source(model: ModelOptions) -> Source:
    """The checkpoint that the options name; raises UserError when none is named or there is nothing."""
    if model.pretrained_model_name_or_path is None:
        raise UserError("no base model is given", fix="--pretrained_model_name_or_path FILE_OR_FOLDER")
    name = model.pretrained_model_name_or_path
    path = find_path(name)
    return Source(path, hub_name="" if Path(name).exists() else name)


def find_path(name: str) -> Path:
    """A file or folder as it is; a name on the hub (owner/name) becomes its folder in the hub's cache.

    What the cache lacks is downloaded, unless HF_HUB_OFFLINE is set. Raises UserError where there is nothing.
    """
    path = Path(name)
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{path} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_VARIANTS)))
    except (OSError, ValueError) as error:  # not found, no access, no connection, a malformed name
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is neither a file or folder here nor a model that the hub gave ({reason})",
            fix="give the path of a checkpoint, or download the model first",
        ) from error


def weight_file(folder: Path) -> Path:
    """The weight file of a network saved by diffusers or transformers."""
    for name in ("diffusion_pytorch_model", "model"):
        for ending in (".safetensors", ".safetensors.index.json", ".fp16.safetensors"):
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    raise UserError(f"{folder} holds no .safetensors weights")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The entries of one network inside a file, and the key map that leads from them to the module."""

    file: Checkpoint
    key_map: KeyMap
    prefix: str = ""
    rows: Callable[[str, Sequence[int]], Sequence[int]] | None = None  # stacked original key, shape -> rows of each
    tied: Mapping[str, str] = field(default_factory=dict)  # our names that share another's tensor

    def originals(self) -> Iterator[str]:
        """Keys without the prefix, those dropped on purpose left out."""
        for key in self.file.header.tensors:
            if key.startswith(self.prefix) and not self.key_map.drops(key[len(self.prefix) :]):
                yield key[len(self.prefix) :]

    def shapes(self) -> Shapes:
        """Our name -> shape, from the header alone; raises UserError for keys that no rule covers.

        So does asking for a name that is not there.
        """
        shapes: Shapes = {}
        unknown: list[str] = []
        for original in self.originals():
            found = self.key_map.ours(original)
            if found is None:
                unknown.append(original)
                continue
            names, op = found
            shape = torch.Size(self.file.header.tensors[self.prefix + original].shape)
            if not shape:
                continue
            if op == "squeeze":
                shape = shape[:2]
            if op == "transpose":
                shape = shape[::-1]
            rows = [shape[0]] if len(names) == 1 else self._rows(original, shape, len(names))
            shapes |= {name: torch.Size((n, *shape[1:])) for name, n in zip(names, rows, strict=True)}
        if unknown:
            some = ", ".join(unknown[:5])
            raise UserError(f"{self.file.header.path} holds {len(unknown)} keys of no known place: {some}")
        return Found(self.file.header.path, shapes)

    @cached_property
    def places(self) -> dict[str, str]:
        """Our name -> the key without prefix that holds it, alone or stacked with others."""
        found = ((original, self.key_map.ours(original)) for original in self.originals())
        return {name: original for original, ours in found if ours for name in ours[0]}

    def empty(self, name: str) -> torch.Tensor:
        """One of our tensors without its values: the type and shape that it has in the file."""
        stored = self.file.header.tensors[self.prefix + self.places[name]]
        return torch.empty(self.shapes()[name], dtype=DTYPES[stored.dtype], device="meta")

    def read(self, name: str) -> torch.Tensor:
        """One of our tensors as the file has it."""
        original = self.places[name]
        pieces = self.key_map.split(original, self.file.read(self.prefix + original), self.shapes())
        return next(piece for ours, piece in pieces if ours == name)

    def _rows(self, original: str, shape: torch.Size, count: int) -> Sequence[int]:
        if self.rows is not None:
            return self.rows(original, shape)
        return [shape[0] // count] * count

    def fill(self, module: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
        """Put the file's tensors into a module that stands on the meta device, one tensor at a time."""
        expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
        state: dict[str, torch.Tensor] = {}
        for original in self.originals():
            tensor = self.file.read(self.prefix + original, dtype=dtype, device=device)
            names = self.key_map.ours(original)
            if names is None or not set(names[0]) <= set(expected):
                raise UserError(
                    f"{self.file.header.path}: {self.prefix + original} has no place in {type(module).__name__}"
                )
            for name, piece in self.key_map.split(original, tensor, expected):
                if piece.shape != expected[name]:
                    raise UserError(
                        f"{self.file.header.path}: {self.prefix + original} has shape {tuple(piece.shape)}, "
                        f"{tuple(expected[name])} is expected"
                    )
                state[name] = piece
        state |= {name: state[other] for name, other in self.tied.items() if name in expected and other in state}
        missing = [name for name in expected if name not in state]
        if missing:
            raise UserError(
                f"{self.file.header.path} lacks {len(missing)} tensors, for example {', '.join(missing[:5])}"
            )
        module.load_state_dict(state, assign=True)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network without storage for its parameters, but with its buffers: no throwaway initialisation."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build()
