"""The weights of one network in a file: their names and shapes in the module, and how they are read into it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sfumato.common.text import list_some, plural
from sfumato.errors import UserError
from sfumato.families._file_kinds import ShapeTable
from sfumato.families.finite_check import FiniteCheck
from sfumato.families.foreign_keys import describe_passed_over, find_conflicts
from sfumato.formats.checkpoint import SAFETENSORS_DTYPES, Checkpoint, HeaderFile, TensorFile
from sfumato.formats.keymap import KeyMap
from sfumato.quantization.weight import keep_in_format
from sfumato.quantization.weight_format import WeightFormat

log = logging.getLogger(__name__)
Shapes = dict[str, torch.Size]
Formats = Mapping[str, WeightFormat]  # our name of a weight -> how it is kept in memory
NO_FORMATS: Formats = {}
Keep = Callable[[str, torch.Tensor], torch.Tensor]  # our name and a tensor as it was read -> what stays in memory


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
                f"{self.file.header.path} has {plural(len(conflicts), 'unknown key')}: {list_some(conflicts)}",
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
            found = self.key_map.find_ours(original)
            names = () if found is None else found[0]
            if not names or not set(names) <= set(expected):
                continue
            is_hosted = names[0].startswith(on_host)
            if is_hosted and mapped and self.can_map(original, dtype):
                tensor = self._map(original)
            else:
                place = torch.device("cpu") if is_hosted else device
                tensor = self._read_any(original, dtype, place, stored=set(names) <= formats.keys())
            if has_numbers:  # else nothing is read, and there are none to look at
                largest = min(formats[name].largest if name in formats else math.inf for name in names)
                finite.add(self.prefix + original, tensor, largest)
            for name, piece in self.key_map.split(original, tensor, expected):
                self._check_shape(original, piece, expected[name])
                kept = keep_in_format(piece, formats[name]) if name in formats else piece
                state[name] = kept if keep is None else keep(name, kept)
        state |= {name: state[other] for name, other in self.tied.items() if name in expected and other in state}
        self._check_complete(state, expected)
        finite.finish(self.file)
        module.load_state_dict(state, assign=True)
        for name, other in self.tied.items():  # which assigning makes two parameters of
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, module.get_parameter(other))

    def _check_shape(self, original: str, piece: torch.Tensor, expected: torch.Size) -> None:
        if piece.shape != expected:
            raise UserError(
                f"{self.file.header.path}: {self.prefix + original} has shape {tuple(piece.shape)}, "
                f"expected {tuple(expected)}",
                code="network-shape-mismatch",
            )

    def _check_complete(self, state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
        missing = [name for name in expected if name not in state]
        if missing:
            raise UserError(
                f"{self.file.header.path} lacks {plural(len(missing), 'tensor')}: {list_some(missing)}",
                code="network-tensors-missing",
            )

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
