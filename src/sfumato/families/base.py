"""What truly differs between models, and nothing else: READ before any family.

A family describes a checkpoint from its headers (Blueprint), loads it, and answers six questions: how text becomes
features, how features become the denoiser's arguments, how pixels become latents and back, and what it predicts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.common.registry import Registry
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.config.schema import vocabulary
from sfumato.data.batch import Images, Sizes, Tensors, name_control
from sfumato.data.buckets import Size
from sfumato.data.prompt_weighting import WeightedText
from sfumato.errors import UserError
from sfumato.families import _vae
from sfumato.families._file_kinds import describe_keys
from sfumato.families._other_models import name_other_model
from sfumato.families.blueprint import Blueprint, Component, Sampling
from sfumato.families.control_net import (
    ControlNetSupport,
    is_control_net,
    name_control_net,
    scale_arguments,
    sum_arguments,
)
from sfumato.families.part import Builder, Network, Part, PartSpec, WeightChange
from sfumato.families.source import MODEL_INDEX, Source, read_json
from sfumato.formats.controlled import ControlledLayer

GIVE_MODEL = "give a model's checkpoint, or its folder in diffusers' layout"
FAMILIES: Registry[type[Family]] = Registry("model family")


class TokenBudget(NamedTuple):
    """How many tokens captions have and how many an encoder reads; begin and end tokens do not count."""

    lengths: Sequence[int]  # of each caption
    limit: int  # further tokens are cut off


class Place(NamedTuple):
    """The dtype of a network's weights, and the device they are on while it is loaded."""

    dtype: torch.dtype
    device: torch.device


class Family(ABC):
    """A model, whose networks are loaded when they are needed. Subclasses set the class variables and implement the
    abstract methods."""

    name: ClassVar[str]
    text_parts: tuple[str, ...]  # the text encoders in the order of --text_encoder_lr; a model may lack some
    bucket_step: ClassVar[int]  # bucket_reso_steps must be a multiple
    sampling: Sampling  # the defaults; a variant of the model may have others
    options: ClassVar[frozenset[str]] = frozenset()  # which of the options that only some families read
    sd_scripts_reads: ClassVar[frozenset[str]] = frozenset()  # options that its script reads and not every flow's does
    components: ClassVar[Mapping[str, Component]] = {}  # part name -> folder in diffusers' layout
    num_references: ClassVar[int] = 0  # reference images that it takes beside the noisy one
    control_net: ClassVar[ControlNetSupport | None] = None
    # The layers of the denoiser that LLLite changes, by their names in files.
    list_controlled_layers: ClassVar[Callable[[Blueprint], Mapping[str, ControlledLayer]] | None] = None
    no_control_net: ClassVar[str] = "diffusers has no class for them"  # why, where there is none
    has_pooled_text: ClassVar[bool] = False  # whether a text encoder's features have a pooled vector
    has_size_inputs: ClassVar[bool] = False  # whether its denoiser is told the image's sizes
    has_deep_shrink: ClassVar[bool] = False  # whether its denoiser's features can be made smaller
    couples_parts: ClassVar[bool] = False  # whether its denoiser can combine the parts of an image after each layer
    prompt_prefix: str = ""  # before every caption and prompt, except negative and empty ones

    def __init__(self, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> None:
        """No weight is read. dtype: of the weights of frozen networks; device: on which the model computes."""
        self.blueprint = blueprint
        self.model_options = model
        self.dtype = dtype
        self.device = device
        self.objective = blueprint.objective
        self.latents = blueprint.latents
        self.text_parts = blueprint.text_parts
        self.tokenizers: dict[str, Any] = dict(self.load_tokenizers(blueprint, model))  # of each text encoder
        self.control_adapters = 0  # how many that read a control image are attached to the denoiser
        self.controls_in_latents: set[int] = set()  # the numbers of those that read it as latents
        self.takes_control_mask = False  # whether one of them reads a mask beside its image
        self.vae_tile_size = 0  # pixels a side of the autoencoder's tiles; 0: whole images
        self.overflow_warned = False  # whether the warning about half precision was given
        builders = {"vae": _vae.build, **self.builders(blueprint)}
        if self.control_net is not None:
            builders |= {name: self.control_net.build for name in blueprint.networks if is_control_net(name)}
        self.parts: dict[str, Part] = {}
        for name, network in blueprint.networks.items():
            place = self.choose_place(name)
            self.parts[name] = Part(network, builders[name], dtype=place.dtype, device=place.device)
        self.parts["denoiser"].add_change(WeightChange(identity="", apply=self.finish_denoiser))

    @property
    def denoiser(self) -> nn.Module:
        return self.parts["denoiser"].module

    @property
    def vae(self) -> nn.Module:
        return self.parts["vae"].module

    def load(self) -> None:
        """Read the weights of every network."""
        for part in self.parts.values():
            part.load()

    @classmethod
    def choose_dtype(cls, part: str, dtype: torch.dtype, model: ModelOptions) -> torch.dtype:
        """Of a network's weights. dtype: of those of frozen networks in general."""
        return _vae.choose_dtype(dtype, no_half=model.no_half_vae) if part == "vae" else dtype

    def choose_place(self, part: str) -> Place:
        """Where a network computes, and in which dtype its weights are."""
        dtype = self.blueprint.networks[part].dtype or self.dtype
        return Place(self.choose_dtype(part, dtype, self.model_options), self.device)

    def finish_denoiser(self, denoiser: nn.Module) -> None:
        """Called after the denoiser's weights were read."""
        return

    @classmethod
    @abstractmethod
    def detect(cls, source: Source) -> bool:
        """Whether the source's keys (or configuration files) are this family's."""

    @classmethod
    @abstractmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        """Describe the checkpoint from its headers. Raises UserError for a file of another kind."""

    @classmethod
    def read_networks(cls, source: Source, model: ModelOptions) -> Mapping[str, Network]:
        """The networks that adapters may change and whose weights are in the source or in files that options name.

        The default is for models whose files hold all of them; others lack those that are in no file.
        """
        networks = cls.read(source, model, NoiseOptions()).networks
        return {name: network for name, network in networks.items() if network.spec.targets}

    @classmethod
    def name_base_model(cls, denoiser: Network) -> str:
        """sd-scripts' name of the model, in adapter files."""
        return cls.name

    @classmethod
    @abstractmethod
    def builders(cls, blueprint: Blueprint) -> Mapping[str, Builder]:
        """Part name -> how that network is built from its configuration; the autoencoder's has a default."""

    @classmethod
    def adapter_specs(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        """Part name -> spec of the parts that an adapter file may adapt, without the model it was made for.

        shapes: name in the file -> shape of the weight that it changes. Empty where the family does not support this.
        """
        return {}

    def unread_layers(self, part: str) -> Sequence[str]:
        """Patterns on the names of an encoder's last layers and weights, where its features do not depend on them."""
        return ()

    @classmethod
    def load_tokenizers(cls, blueprint: Blueprint, model: ModelOptions) -> Mapping[str, Any]:
        """Text encoder -> its tokenizer. UserError where one is missing or has another vocabulary than its encoder."""
        return {}

    @abstractmethod
    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        """Features of one encoder: one dict per caption WITHOUT batch dimension, without padding that is masked."""

    def apply_prompt_weights(self, part: str, features: Tensors, pieces: WeightedText) -> Tensors:
        """One caption's features with weights applied to its words; unchanged where there is no feature per word.

        Called only where `options` has weighted_captions.
        """
        return features

    def drop_text(self, part: str, features: Tensors, dropped: Tensor) -> Tensors:
        """An encoder's features (B, ...) with zeros, False in masks, for the samples marked in `dropped` (B,) bool.

        Called only where `options` has the encoder's dropout rate.
        """
        result: Tensors = {}
        for name, tensor in features.items():
            rows = dropped.reshape(-1, *[1] * (tensor.ndim - 1))
            result[name] = tensor.masked_fill(rows, 0)
        return result

    def set_resolutions(self, resolutions: Iterable[tuple[int, int]]) -> None:
        """Called with each (width, height) of the images, before the first; most families ignore it."""
        return

    @abstractmethod
    def text_fingerprint(self, part: str) -> str:
        """What an encoder's features depend on besides weights and caption: token length, masks, layer."""

    def token_budget(self, part: str, captions: Sequence[str]) -> TokenBudget | None:
        """The captions' lengths against the tokens that an encoder reads; None where the family does not say."""
        return None

    @abstractmethod
    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        """Features of all encoders -> conditioning, named by the denoiser's arguments."""

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and the posterior's noise (B, C, h, w) -> scaled latents."""
        return _vae.encode(self.parts["vae"], self.latents, pixels, noise, tile=self.vae_tile_size)

    def shrink_mask(self, masks: Tensor) -> Tensor:
        """What a denoiser for inpainting sees of masks (B, 1, H, W): (B, M, h, w) in the size of latents."""
        height, width = masks.shape[-2:]
        return F.interpolate(masks, size=(height // self.latents.downscale, width // self.latents.downscale))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> (B, 3, H, W) in [-1, 1]."""
        return _vae.decode(self.parts["vae"], self.latents, latents, tile=self.vae_tile_size)

    @abstractmethod
    def make_inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        """Arguments of the denoiser or a control network: packed latents, position ids, masks, scaled time."""

    def convert_output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        """The denoiser's output as a diffusers scheduler expects it: unpacked, with its sign. Default: unchanged."""
        return raw

    def add_images(self, arguments: dict[str, object], noisy: Tensor, images: Images) -> dict[str, object]:
        """The denoiser's arguments with the further images that the family takes. Default: it takes none."""
        return arguments

    @property
    def takes_control(self) -> bool:
        """Whether a control image steers what this model generates."""
        return self.num_controls > 0

    @property
    def num_controls(self) -> int:
        """How many control images they read: the n-th ControlNet and the n-th LLLite the same one."""
        return max(self.control_adapters, len(self.control_nets))

    @property
    def control_nets(self) -> list[str]:
        """The parts that are ControlNets; the n-th reads the n-th control image."""
        return [name for name in self.parts if is_control_net(name)]

    @property
    def takes_control_latents(self) -> bool:
        """Whether what reads the first control image reads it as latents."""
        return self.reads_control_latents(0)

    def reads_control_latents(self, number: int) -> bool:
        """Whether the ControlNet or the LLLite of this number reads its control image as latents."""
        return number in self.controls_in_latents or self._reads_net_latents(name_control_net(number)) is True

    def reads_control_pixels(self, number: int) -> bool:
        """Whether one of them reads it as pixels."""
        by_adapter = number < self.control_adapters and number not in self.controls_in_latents
        return by_adapter or self._reads_net_latents(name_control_net(number)) is False

    def _reads_net_latents(self, part: str) -> bool | None:
        """Whether a ControlNet reads latents; None where the model has no such part."""
        if self.control_net is None or part not in self.parts:
            return None
        return self.control_net.takes_latents(self.parts[part].network.config)

    def add_control(self, arguments: dict[str, object], images: Images) -> dict[str, object]:
        """The denoiser's arguments with the sum of what the ControlNets compute that have a control image."""
        steered: dict[str, object] = {}
        for number, name in enumerate(self.control_nets):
            control = images.get(name_control(number))
            if control is None:
                continue
            assert self.control_net is not None
            image = control.latents if self._reads_net_latents(name) else control.pixels
            assert image is not None
            image = image.to(self.parts[name].device, self.parts[name].dtype, non_blocking=True)
            own = self.control_net.run(self, name, arguments, image)
            own = own if control.strength == 1 else scale_arguments(own, control.strength)
            steered = sum_arguments(steered, own) if steered else own
        return {**arguments, **steered}

    def choose_reference_size(self, image: Size, generated: Size) -> Size:
        """The size, (width, height) in pixels, at which an image is a reference for an image of the second size."""
        return generated

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Tensors, images: Images | None = None) -> Tensor:
        """(B, C, h, w), t in 0..1000 float32 -> what a diffusers scheduler calls model_output.

        images: by role; only those that the family takes are read.
        """
        arguments = self.add_control(self.make_inputs(noisy, t, conditioning), images or {})
        arguments = self.add_images(arguments, noisy, images or {})
        raw = self.denoiser(**arguments, return_dict=False)[0]
        return self.convert_output(raw, noisy)


def find_family(name: str | None, source: Source) -> type[Family]:
    """The family by name, or the one that recognizes the checkpoint. Raises UserError for one of another family."""
    other = name_other_model(source.shapes)
    if other:
        raise UserError(
            f"{source.path} is {other}, which cannot be trained here; known families: {', '.join(FAMILIES.names)}",
            code="checkpoint-kind-untrainable",
            fix=GIVE_MODEL,
        )
    families = [FAMILIES.get(known) for known in FAMILIES.names]
    recognized = next((family for family in families if family.detect(source)), None)
    if name is None:
        if recognized is None:
            raise _unknown_checkpoint(source, f"known families: {', '.join(FAMILIES.names)}")
        return recognized
    wanted = FAMILIES.get(name)
    if not wanted.detect(source):
        if recognized is None:
            raise _unknown_checkpoint(source, f"expected a checkpoint of the family {name!r}")
        variant = recognized.name if recognized.name in vocabulary()["model_type"].choices else ""
        raise UserError(
            f"{source.path} is a checkpoint of the family {recognized.name!r}, not of {name!r}",
            code="model-family-mismatch",
            fix=variant and f"--model_type {variant}",
        )
    return wanted


def _unknown_checkpoint(source: Source, expected: str) -> UserError:
    what = f"{source.path} is {_describe_source(source)}; {expected}"
    return UserError(what, code="model-family-unknown", fix=GIVE_MODEL)


def _describe_source(source: Source) -> str:
    """What a checkpoint that no family recognizes is."""
    if not source.is_folder:
        return describe_keys(source.shapes) or "of no known kind"
    config = source.read_config(".") if source.has_network(".") else {}
    network = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if network:
        return f"a folder with {network} alone"
    index = source.path / MODEL_INDEX
    pipeline = read_json(index).get("_class_name") if index.is_file() else None
    return f"a model folder of {pipeline}" if pipeline else "a folder without a model in diffusers' layout"
