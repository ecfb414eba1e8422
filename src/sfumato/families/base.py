"""What truly differs between models, and nothing else: READ before any family.

A family describes a checkpoint from its headers (Blueprint), loads it, and answers six questions: how text becomes
features, how features become the denoiser's arguments, how pixels become latents and back, and what it predicts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from sfumato.common.registry import Registry
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.config.schema import vocabulary
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import Pieces
from sfumato.diffusion.objective import LatentSpec, Objective
from sfumato.errors import UserError
from sfumato.families._file_kinds import describe, told_of
from sfumato.families.source import Source, Weights, on_meta
from sfumato.formats.groups import Layer, LayerGroup, file_name, layer_groups, layers_of, skeleton
from sfumato.formats.keymap import KeyMap, identity, matches

Builder = Callable[[Mapping[str, Any]], nn.Module]  # a network from its configuration
Rows = Callable[[str, Sequence[int]], Sequence[int]]  # of a stacked original weight: key, shape -> rows of each layer
BASE_MODEL = "--pretrained_model_name_or_path FILE_OR_FOLDER"
FAMILIES: Registry[type[Family]] = Registry("model family")


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """The data by which shared code adapts, freezes, offloads, names and saves one network; needs no weights."""

    name: str  # "denoiser", "clip_l", "t5"
    key_map: KeyMap  # checkpoint file <-> module
    key_prefix: str  # in the single file: "model.diffusion_model."
    adapter_map: KeyMap  # adapter names <-> module; often another layout than key_map
    adapter_prefix: str  # "lora_unet", "lora_te1"
    adapter_aliases: tuple[KeyMap, ...] = ()  # further layouts accepted when reading
    targets: tuple[str, ...] = ()  # patterns on the module's own names: Linear and 1x1 conv layers to adapt
    conv_targets: tuple[str, ...] = ()  # further patterns when conv_dim is given
    extra_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # in_dims -> further targets, one a rank
    # Network arguments over names as adapter files have them, with dots; a|b matches either.
    kinds: Mapping[str, str] = field(default_factory=dict)  # img_attn_dim -> the layers whose rank it sets
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # train_blocks -> value -> what is adapted
    counted: Mapping[str, str] = field(default_factory=dict)  # train_block_indices -> the blocks that {n} counts
    stages: tuple[str, ...] = ()  # ordered patterns on original keys (a|b: either): what --block_lr counts
    sections: Mapping[str, range] = field(default_factory=dict)  # down_lr_weight -> the stages it counts
    blocks: tuple[str, ...] = ()  # patterns on the paths of the repeated blocks
    opt_in: str = ""  # the network argument that alone lets this part train (train_t5xxl)
    tables: tuple[str, ...] = ()  # the module's own names of tensors in the file that are no weights and never train
    rows: Rows | None = None  # how a stacked weight falls apart, from its original key and shape; None: evenly

    @property
    def every_target(self) -> tuple[str, ...]:
        """Patterns on all adaptable layers, those that only an option reaches included."""
        more = (target for targets in self.extra_targets.values() for target in targets)
        return (*self.targets, *self.conv_targets, *more)

    def groups(self, layers: Mapping[str, Layer], *, every: bool = False) -> list[LayerGroup]:
        """The usually adapted layers among `layers`, or `every` adaptable one, grouped by names in adapter files."""
        targets = self.every_target if every else self.targets
        return layer_groups(layers, targets, part=self.name, prefix=self.adapter_prefix, adapter_map=self.adapter_map)

    def stage(self, name: str) -> int | None:
        """The place among `stages` of the block that holds a layer or weight with this name of ours."""
        original = self.key_map.locate(name).original
        return next((i for i, stage in enumerate(self.stages) if matches(stage, original)), None)

    def aliases(self, groups: Sequence[LayerGroup]) -> dict[str, str]:
        """Name in a further layout -> our name, for the groups that are one layer there, too."""
        found: dict[str, str] = {}
        for group in groups:
            ours = self.adapter_map.locate(group.paths[0])
            for layout in self.adapter_aliases:
                place = layout.locate(group.paths[0])
                if (place.siblings, place.op) == (ours.siblings, ours.op):
                    found[file_name(self.adapter_prefix, place.original)] = group.name
        return found


@dataclass(kw_only=True)
class Part:
    """One network of a loaded model."""

    spec: PartSpec
    module: nn.Module

    def groups(self, *, every: bool = False) -> list[LayerGroup]:
        return self.spec.groups(layers_of(self.module), every=every)


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network before it is loaded: its data, its configuration and where its weights lie."""

    spec: PartSpec
    config: Mapping[str, Any]
    weights: Weights
    dtype: torch.dtype | None = None  # that this network is loaded in whatever the rest of the model is
    option: str = ""  # that names its file

    def groups(self, *, every: bool = False) -> list[LayerGroup]:
        """The groups a loaded Part would have, from the file's header alone."""
        return self.spec.groups(skeleton(self.weights.shapes()), every=every)

    def load(self, build: Builder, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Build from the configuration without storage, then fill from the file in the wanted dtype."""
        module = on_meta(lambda: build(self.config))
        with told_of(self.option):
            self.weights.fill(module, dtype=self.dtype or dtype, device=device)
        self.weights.file.close()  # opens again by itself when something more is read
        return module.to(device)  # buffers


class Room(NamedTuple):
    """How captions fit; what begins and ends a caption does not count."""

    lengths: Sequence[int]  # tokens of each caption
    limit: int  # tokens that are read, the others are cut


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a preview uses where the prompt is silent."""

    width: int
    height: int
    steps: int
    scale: float  # classifier-free guidance
    guidance: float | None  # embedded guidance
    size_multiple: int
    cfg_trunc_ratio: float = 1.0  # classifier-free guidance only before this share of the way from noise to picture
    renorm_cfg: float = 0.0  # longest a guided prediction may be, in lengths of the one for the prompt; 0: any length


@dataclass(frozen=True, kw_only=True)
class Component:
    """A network as a folder inside a folder of diffusers'."""

    folder: str
    key_map: KeyMap = field(default_factory=identity)  # weights there <-> module
    takes_lora: bool = True  # whether diffusers' pipeline loads LoRA for it


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What a folder in diffusers' layout needs to know of a model beyond its networks."""

    name: str  # diffusers' class
    networks: Mapping[str, Component]  # by our names
    scheduler: str  # diffusers' class, told what the objective says and these options
    scheduler_options: Mapping[str, Any]
    tokenizers: tuple[str, ...]  # folders, in the order of the text encoders
    absent: tuple[str, ...] = ()  # what the class takes and this model does not have
    options: Mapping[str, Any] = field(default_factory=dict)  # further entries of model_index.json


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What a checkpoint's headers tell, before any weight is read."""

    source: Source
    title: str  # "Stable Diffusion 1.x", for reports
    base_model_version: str  # ss_base_model_version in adapter files
    architecture: str  # modelspec.architecture
    networks: Mapping[str, Network]  # by part name; the autoencoder under "vae"
    text_parts: tuple[str, ...]
    objective: Objective
    latents: LatentSpec
    checkpoint: tuple[str, ...] = ("denoiser",)  # the networks in a single file of this family
    pipeline: Pipeline | None = None  # None: whole models of the family are always saved as one file
    implementation: str = "diffusers"  # modelspec.implementation
    metadata: Mapping[str, Any] = field(default_factory=dict)  # ss_ keys that only this family's files have
    notes: tuple[str, ...] = ()  # what the user should know before the first step; errors with --strict

    def in_file(self, part: str) -> bool:
        """Whether a network lies in the model's own checkpoint, or would if it were a single file."""
        if self.source.is_folder:
            return part in self.checkpoint
        return self.networks[part].weights.file is self.source.file

    def with_dtype(self, parts: Collection[str], dtype: torch.dtype) -> Blueprint:
        """The same, but some networks are loaded in a dtype of their own."""
        changed = {name: replace(self.networks[name], dtype=dtype) for name in parts}
        return replace(self, networks={**self.networks, **changed})

    def load(self, builders: Mapping[str, Builder], *, dtype: torch.dtype, device: torch.device) -> dict[str, Part]:
        """The named networks, each built from its configuration and filled from its file."""
        networks = {name: self.networks[name] for name in builders}
        return {
            name: Part(spec=network.spec, module=network.load(builders[name], dtype=dtype, device=device))
            for name, network in networks.items()
        }


class Family(ABC):
    """A loaded model. Subclasses set the class variables and answer the abstract questions."""

    name: ClassVar[str]
    text_parts: tuple[str, ...]  # names of the text encoders, in the order of --text_encoder_lr; of one model: it has
    bucket_step: ClassVar[int]  # bucket_reso_steps must be a multiple
    sampling: ClassVar[Sampling]
    options: ClassVar[frozenset[str]] = frozenset()  # of those that only some families read, the ones that this does
    components: ClassVar[Mapping[str, Component]] = {}  # by our names: each network's place in diffusers' layout
    preamble: str = ""  # what stands before every caption and prompt, but neither before negative nor empty ones

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module) -> None:
        self.blueprint = blueprint
        self.objective = blueprint.objective
        self.latents = blueprint.latents
        self.text_parts = blueprint.text_parts
        self.parts = dict(parts)
        self.vae = vae
        self.overflow_told = False  # whether it was said that the autoencoder overflows in half precision

    @property
    def denoiser(self) -> nn.Module:
        return self.parts["denoiser"].module

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @classmethod
    @abstractmethod
    def detect(cls, source: Source) -> bool:
        """Whether the source's keys (or configuration files) are this family's."""

    @classmethod
    @abstractmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        """Describe the checkpoint from its headers; a file of another kind is a UserError."""

    @classmethod
    @abstractmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        """Build the networks and fill them straight in the wanted dtype; no second copy of the weights."""

    @classmethod
    def adapted(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        """The parts that an adapter file may speak of, by their names, without the model that it was made for.

        shapes: name in the file -> shape of the weight that it changes. A family that cannot tell gives none.
        """
        return {}

    def tokenizers_in_order(self) -> Sequence[Any]:
        """One for each text encoder; only asked for where the blueprint has a pipeline."""
        return ()

    @abstractmethod
    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        """One encoder, one dict per caption WITHOUT batch dimension, cut to the length that matters."""

    def weigh(self, part: str, features: Tensors, pieces: Pieces) -> Tensors:
        """One caption's features with some of its words counting more or less; an encoder that gives no feature for
        each word leaves them as they are. Only called where `options` has weighted_captions.
        """
        return features

    def dropped_text(self, part: str, features: Tensors, dropped: Tensor) -> Tensors:
        """Features (B, ...) of an encoder that the samples marked in (B,) bool do without: zeros, False in masks.

        Only called where `options` has the encoder's dropout rate.
        """
        rows = {name: dropped.reshape(-1, *[1] * (tensor.ndim - 1)) for name, tensor in features.items()}
        return {name: tensor.masked_fill(rows[name], 0) for name, tensor in features.items()}

    def expect(self, resolutions: Iterable[tuple[int, int]]) -> None:
        """Told before training which (width, height) the datasets have; most families need not know."""
        return

    @abstractmethod
    def text_fingerprint(self, part: str) -> str:
        """What, besides weights and caption, an encoder's features depend on (token length, masks, layer)."""

    def room(self, part: str, captions: Sequence[str]) -> Room | None:
        """How the captions fit the tokens that an encoder reads; None where the family does not tell."""
        return None

    @abstractmethod
    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        """Features of all encoders -> Conditioning, named by the denoiser's arguments."""

    @abstractmethod
    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and the posterior's noise (B, C, h, w) -> scaled latents."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        """Arguments of the denoiser: packing, position ids, masks, time scale; a control network takes the same."""

    @abstractmethod
    def output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        """The denoiser's output as a diffusers scheduler expects it: sign and packing undone."""

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> Tensor:
        """(B, C, h, w), t in 0..1000 float32 -> what a diffusers scheduler calls model_output."""
        raw = self.denoiser(**self.inputs(noisy, t, conditioning), return_dict=False)[0]
        return self.output(raw, noisy)

    def to(self, device: torch.device) -> None:
        for part in self.parts.values():
            part.module.to(device)
        self.vae.to(device)

    def freeze(self) -> None:
        """Nothing of the model trains until a method says so."""
        for module in (*(part.module for part in self.parts.values()), self.vae):
            module.requires_grad_(False).eval()


def find_family(name: str | None, source: Source) -> type[Family]:
    """The family by name, or the one that recognises the checkpoint; a checkpoint of another family is a UserError."""
    known = [FAMILIES.get(each) for each in FAMILIES.names]
    recognised = next((family for family in known if family.detect(source)), None)
    if name is None:
        if recognised is None:
            what = f"{source.path} is {_described(source)}, where a checkpoint of a known kind is expected"
            raise UserError(f"{what} ({', '.join(FAMILIES.names)})", fix=BASE_MODEL)
        return recognised
    wanted = FAMILIES.get(name)
    if not wanted.detect(source):
        if recognised is None:
            what = f"{source.path} is {_described(source)}, where a checkpoint of the family {name!r} is expected"
            raise UserError(what, fix=BASE_MODEL)
        variant = recognised.name if recognised.name in vocabulary()["model_type"].choices else ""
        raise UserError(
            f"{source.path} is a checkpoint of the family {recognised.name!r}, not of {name!r}",
            fix=variant and f"--model_type {variant}",
        )
    return wanted


def _described(source: Source) -> str:
    """What lies there that no family recognises."""
    if not source.is_folder:
        return describe(source.shapes) or "of no known kind"
    told = source.config(".") if source.has(".") else {}
    kind = told.get("_class_name") or next(iter(told.get("architectures") or ()), None)
    return f"a folder of {kind} alone" if kind else "a folder without a model in diffusers' layout"
