"""The networks of a model, before they are loaded (PartSpec, Network) and after (Part)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn

from sfumato.errors import UserError
from sfumato.families._file_kinds import option_context
from sfumato.families.weights import NO_FORMATS, Formats, Keep, Weights, on_meta
from sfumato.formats.adapter_layers import Views, make_views
from sfumato.formats.groups import Layer, LayerGroup, find_layers, group_layers, is_norm, make_meta_layers
from sfumato.formats.keymap import KeyMap, make_identity_map, matches
from sfumato.formats.network_record import RECORD_KEY, NetworkRecord
from sfumato.quantization.choice import choose_kept, describe_precision
from sfumato.quantization.weight_format import WeightFormat

Builder = Callable[[Mapping[str, Any]], nn.Module]  # configuration -> network
DENOISER_PREFIX = "model.diffusion_model."  # of the denoiser's keys in most checkpoints
DENOISER_NAMES = ("lora_transformer", "oft_unet", "unet", "transformer", "diffusion_model", "model.diffusion_model")
ANY_NAMES = ("lycoris", "")  # before the names of any network's layers
RowSplit = Callable[[str, Sequence[int]], Sequence[int]]  # key, shape of a stacked weight -> rows of each layer


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """The data by which shared code adapts, freezes, offloads, names and saves one network, without its weights."""

    name: str  # "denoiser", "clip_l", "t5"
    key_map: KeyMap  # checkpoint file <-> module
    key_prefix: str  # in the single file: "model.diffusion_model."
    adapter_map: KeyMap  # adapter names <-> module; often another layout than key_map
    adapter_prefix: str  # "lora_unet", "lora_te1"
    adapter_names: tuple[str, ...] = ()  # further prefixes accepted when reading adapter files
    adapter_aliases: tuple[KeyMap, ...] = ()  # further layouts accepted then, beside key_map and the module's own names
    targets: tuple[str, ...] = ()  # patterns on module names: Linear and 1x1 conv layers to adapt
    conv_targets: tuple[str, ...] = ()  # further patterns when conv_dim is given
    extra_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # in_dims -> further targets, one a rank
    other_targets: tuple[str, ...] = ()  # layers that only adapter files of other programs adapt
    norm_targets: tuple[str, ...] = ()  # norm layers with a weight
    # Network arguments -> patterns on the layers' names in adapter files, with dots; a|b matches either.
    rank_kinds: Mapping[str, str] = field(default_factory=dict)  # img_attn_dim -> the layers whose rank it sets
    block_choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # train_blocks -> value -> layers
    block_indices: Mapping[str, str] = field(default_factory=dict)  # train_block_indices -> the blocks that {n} counts
    lr_blocks: tuple[str, ...] = ()  # the blocks of --block_lr in order: patterns on original keys
    lr_block_ranges: Mapping[str, range] = field(default_factory=dict)  # down_lr_weight -> indices of `lr_blocks`
    blocks: tuple[str, ...] = ()  # patterns on the paths of the repeated blocks
    token_table: str = ""  # of a text encoder: the module that looks up the vectors of tokens
    embedding_name: str = ""  # of a text encoder: the name of its vectors in files of textual inversion
    opt_in: str = ""  # the network argument without which this part does not train (train_t5xxl)
    frozen_by_cache: bool = False  # whether it does not train where text features are cached
    constant_tensors: tuple[str, ...] = ()  # module names of tensors in the file that never train
    # Patterns on the module's layers -> what other programs do with an adapter file that has any of them.
    reader_notes: Mapping[str, str] = field(default_factory=dict)
    row_split: RowSplit | None = None  # the rows of each layer in a stacked weight; None: equal shares

    @property
    def all_targets(self) -> tuple[str, ...]:
        """Patterns on all adaptable layers, including those that only an option or another program adapts."""
        extra = chain.from_iterable(self.extra_targets.values())
        return (*self.targets, *self.conv_targets, *extra, *self.other_targets, *self.norm_targets)

    @property
    def adapter_prefixes(self) -> tuple[str, ...]:
        """What may stand before a layer's name in adapter files, with a dot or _ between; "" where nothing does."""
        return (self.adapter_prefix, *self.adapter_names, *ANY_NAMES)

    @property
    def adapter_layouts(self) -> tuple[KeyMap, ...]:
        """The layouts of layers' names in adapter files; the first one is written."""
        return (self.adapter_map, *self.adapter_aliases, self.key_map, make_identity_map())

    def find_reader_notes(self, paths: Iterable[str]) -> list[str]:
        """The notes about a file that adapts the layers with these paths."""
        found = list(paths)
        return [note for layers, note in self.reader_notes.items() if any(matches(layers, path) for path in found)]

    def make_views(self, layers: Mapping[str, Layer]) -> Views:
        """The adaptable ones of these layers under their names in every layout."""
        return make_views(
            keep_norm_targets(layers, self.norm_targets), self.all_targets, part=self.name, layouts=self.adapter_layouts
        )

    def groups(self, layers: Mapping[str, Layer], *, every: bool = False) -> list[LayerGroup]:
        """The layers among `layers` that are adapted by default, or `every` adaptable one, grouped by adapter names."""
        targets, norms = (self.all_targets, self.norm_targets) if every else (self.targets, ())
        known = keep_norm_targets(layers, norms)
        return group_layers(known, targets, part=self.name, prefix=self.adapter_prefix, adapter_map=self.adapter_map)

    def lr_block_index(self, name: str) -> int | None:
        """The index in `lr_blocks` of the block with this layer or weight of the module; None outside of all."""
        original = self.key_map.locate(name).original
        return next((i for i, block in enumerate(self.lr_blocks) if matches(block, original)), None)


def keep_norm_targets(layers: Mapping[str, Layer], norm_targets: Sequence[str]) -> dict[str, Layer]:
    """The layers without the norm layers that are no target; patterns of others may fit all that is in a block."""
    targets = "|".join(norm_targets)
    return {path: layer for path, layer in layers.items() if not is_norm(layer) or matches(targets, path)}


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network before it is loaded: its data, its configuration and where its weights are."""

    spec: PartSpec
    config: Mapping[str, Any]
    weights: Weights
    dtype: torch.dtype | None = None  # None: that of the model
    option: str = ""  # the option that names its file

    @property
    def record(self) -> NetworkRecord | None:
        """What a cache knows of a network whose file is not here; None where it is."""
        header = self.weights.file.header
        is_recorded = RECORD_KEY in header.metadata
        return NetworkRecord.from_metadata(header.metadata, header.path.parent) if is_recorded else None

    @property
    def is_absent(self) -> bool:
        """Whether its file is not here and its weights are never read, since its cached outputs are used."""
        return self.record is not None and bool(self.weights.file.paths())

    def make_absent_error(self, why: str) -> UserError:
        """The error where the network is needed and its file is not here. why: a clause."""
        assert self.record is not None
        return UserError(
            f"{why}, and its file is not here; the cache was filled with {self.record}",
            code="cached-encoder-file-needed",
            fix=f"--{self.option or 'pretrained_model_name_or_path'} FILE",
        )

    def groups(self, *, every: bool = False) -> list[LayerGroup]:
        """The groups that the loaded Part will have, from the file's header alone."""
        return self.spec.groups(self.meta_layers, every=every)

    @cached_property
    def meta_layers(self) -> Mapping[str, Layer]:
        """Its layers without their weights, by their paths."""
        return make_meta_layers(self.weights.read_shapes())

    def read_into(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device,
        formats: Formats = NO_FORMATS,
        hosted_blocks: Sequence[str] = (),
        streams_blocks: bool = False,
        keep: Keep | None = None,
    ) -> None:
        """Read the weights straight in the wanted dtype or format into a module on the meta device; buffers follow.

        hosted_blocks: paths of modules that stay in main memory, whatever the device; streams_blocks: their tensors
        look into the file; keep: what stays of each tensor.
        """
        on_host = tuple(f"{path}." for path in hosted_blocks)
        with option_context(self.option):
            self.weights.fill_module(
                module, dtype=dtype, device=device, formats=formats, on_host=on_host, mapped=streams_blocks, keep=keep
            )
        self.weights.file.close()  # reopens by itself
        for path, child in module.named_modules():
            for name, buffer in child.named_buffers(recurse=False):
                if not f"{path}.".startswith(on_host):
                    setattr(child, name, buffer.to(device))


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """What is done to a network's weights each time they are read, e.g. merging an adapter."""

    identity: str  # differs where the changed weights do: part of the keys of what is cached
    apply: Callable[[nn.Module], None]


class Part:
    """One network of a model: its structure at once, its weights on its device only while they are needed."""

    def __init__(self, network: Network, build: Builder, *, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = network.spec
        self.network = network
        self.dtype = dtype  # of its floating-point weights
        self.device = device
        self.format: WeightFormat | None = None  # that is wanted for the weights of layers in the repeated blocks
        self.keeps_stored = True  # whether those that the file has in fewer bits stay as they are
        self.changes: list[WeightChange] = []
        self.hosted_blocks: tuple[str, ...] = ()  # paths of the blocks whose weights `load` leaves in main memory
        self.streams_blocks = False  # whether these weights look into the file instead of being read
        self.is_loaded = False
        self.make_whole: Keep = lambda name, tensor: tensor  # what a save writes of a weight in memory
        self._build = build
        self._module: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The network; on the meta device unless it is loaded. Another object after `unload`."""
        if self._module is None:
            self._module = on_meta(lambda: self._build(self.network.config))
        return self._module

    def add_change(self, change: WeightChange) -> None:
        """Make a change whenever the weights are read, and now if they are."""
        self.changes.append(change)
        if self.is_loaded:
            change.apply(self.module)

    @property
    def precision(self) -> str:
        """How its weights are kept."""
        return describe_precision(self.dtype, self.format)

    @property
    def weight_formats(self) -> dict[str, WeightFormat]:
        """The weights that are kept in fewer bits: of linear layers and convolutions in the repeated blocks."""
        if not self.keeps_stored:
            return {}
        blocks = "|".join(f"{block}.{{*}}" for block in self.spec.blocks)
        layers = find_layers(self.module).items()
        names = [f"{path}.weight" for path, layer in layers if matches(blocks, path) and not is_norm(layer)]
        formats = {name: choose_kept(self.network.weights.find_format(name), self.format) for name in names}
        return {name: kept for name, kept in formats.items() if kept is not None}

    def can_stream_blocks(self) -> bool:
        """Whether the file has the weights of the hosted blocks, nearly all by size, as they are computed with."""
        weights, shapes = self.network.weights, self.network.weights.read_shapes()
        on_host = tuple(f"{path}." for path in self.hosted_blocks)
        sizes = {True: 0, False: 0}
        for name, original in weights.stored_keys.items():
            if name.startswith(on_host):
                sizes[weights.can_map(original, self.dtype)] += shapes[name].numel()
        return self.format is None and sizes[True] > 9 * sizes[False]

    def load(self, keep: Keep | None = None) -> None:
        """Read the weights, frozen and in eval mode, unless they are there. UserError where their file is not here.

        keep: what stays in memory of each tensor, by our name.
        """
        if self.is_loaded:
            return
        if self.network.is_absent:
            raise self.network.make_absent_error(f"the weights of {self.spec.name} are needed")
        self.network.read_into(
            self.module,
            dtype=self.dtype,
            device=self.device,
            formats=self.weight_formats,
            hosted_blocks=self.hosted_blocks,
            streams_blocks=self.streams_blocks,
            keep=keep,
        )
        self.module.requires_grad_(False).eval()
        for change in self.changes:
            change.apply(self.module)
        self.is_loaded = True

    def unload(self) -> None:
        """Give the weights back. What was attached to the module is lost, so never while it trains."""
        for module in self.module.modules():
            vars(module).pop("forward", None)  # what wraps a forward refers to the module: a cycle would keep both
        self._module = None
        self.is_loaded = False

    def convert(self, dtype: torch.dtype) -> None:
        """Change the dtype of the weights."""
        nn.Module.to(self.module, dtype)  # networks' own versions warn of lost precision
        self.dtype = dtype

    @contextmanager
    def hold(self) -> Iterator[None]:
        """A context with the weights; afterwards they are where they were."""
        was_loaded = self.is_loaded
        self.load()
        try:
            yield
        finally:
            if not was_loaded:
                self.unload()

    def groups(self, *, every: bool = False) -> list[LayerGroup]:
        return self.spec.groups(find_layers(self.module), every=every)

    def hash_weights(self, salt: str) -> str:
        """A hash of the weights as `load` reads them before any change; they are read one at a time and not kept."""
        digest = hashlib.sha256(salt.encode() + (self.precision.encode() if self.format else b""))
        for name, tensor in sorted(self.module.state_dict().items()):
            weight = self.network.weights.read(name, dtype=self.dtype)
            digest.update(f"{name} {weight.dtype} {tuple(tensor.shape)}".encode())
            digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
        self.network.weights.file.close()
        return digest.hexdigest()
