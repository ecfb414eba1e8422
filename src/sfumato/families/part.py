"""The networks of a model, before they are loaded (PartSpec, Network) and after (Part)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from sfumato.families._file_kinds import option_context
from sfumato.families.source import Weights, on_meta
from sfumato.formats.adapter_layers import Views, make_views
from sfumato.formats.groups import Layer, LayerGroup, find_layers, group_layers, make_meta_layers
from sfumato.formats.keymap import KeyMap, make_identity_map, matches

Builder = Callable[[Mapping[str, Any]], nn.Module]  # configuration -> network
DENOISER_PREFIX = "model.diffusion_model."  # of the denoiser's keys in most checkpoints
DENOISER_NAMES = ("lora_transformer", "unet", "transformer", "diffusion_model", "model.diffusion_model")
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
    # Network arguments -> patterns on the layers' names in adapter files, with dots; a|b matches either.
    rank_kinds: Mapping[str, str] = field(default_factory=dict)  # img_attn_dim -> the layers whose rank it sets
    block_choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # train_blocks -> value -> layers
    block_indices: Mapping[str, str] = field(default_factory=dict)  # train_block_indices -> the blocks that {n} counts
    lr_blocks: tuple[str, ...] = ()  # the blocks of --block_lr in order: patterns on original keys
    lr_block_ranges: Mapping[str, range] = field(default_factory=dict)  # down_lr_weight -> indices of `lr_blocks`
    blocks: tuple[str, ...] = ()  # patterns on the paths of the repeated blocks
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
        return (*self.targets, *self.conv_targets, *extra, *self.other_targets)

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
        return make_views(layers, self.all_targets, part=self.name, layouts=self.adapter_layouts)

    def groups(self, layers: Mapping[str, Layer], *, every: bool = False) -> list[LayerGroup]:
        """The layers among `layers` that are adapted by default, or `every` adaptable one, grouped by adapter names."""
        targets = self.all_targets if every else self.targets
        return group_layers(layers, targets, part=self.name, prefix=self.adapter_prefix, adapter_map=self.adapter_map)

    def lr_block_index(self, name: str) -> int | None:
        """The index in `lr_blocks` of the block with this layer or weight of the module; None outside of all."""
        original = self.key_map.locate(name).original
        return next((i for i, block in enumerate(self.lr_blocks) if matches(block, original)), None)


@dataclass(kw_only=True)
class Part:
    """One network of a loaded model."""

    spec: PartSpec
    module: nn.Module

    def groups(self, *, every: bool = False) -> list[LayerGroup]:
        return self.spec.groups(find_layers(self.module), every=every)


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network before it is loaded: its data, its configuration and where its weights are."""

    spec: PartSpec
    config: Mapping[str, Any]
    weights: Weights
    dtype: torch.dtype | None = None  # None: that of the model
    option: str = ""  # the option that names its file

    def groups(self, *, every: bool = False) -> list[LayerGroup]:
        """The groups that the loaded Part will have, from the file's header alone."""
        return self.spec.groups(make_meta_layers(self.weights.read_shapes()), every=every)

    def load(self, build: Builder, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Build from the configuration on the meta device, then read the weights straight in the wanted dtype."""
        module = on_meta(lambda: build(self.config))
        with option_context(self.option):
            self.weights.fill_module(module, dtype=self.dtype or dtype, device=device)
        self.weights.file.close()  # reopens by itself
        return module.to(device)  # buffers
