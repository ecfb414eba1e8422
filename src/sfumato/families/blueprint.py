"""What a checkpoint's headers say about a model, before any weight is read, and its place in diffusers' layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sfumato.diffusion.objective import LatentSpec, Objective
from sfumato.families.part import Network
from sfumato.families.source import Source
from sfumato.formats.checkpoint import HeaderFile
from sfumato.formats.keymap import KeyMap, make_identity_map

STABILITY_AI = "https://github.com/Stability-AI/generative-models"  # a value of modelspec.implementation


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The defaults of `generate` and of samples while training."""

    width: int
    height: int
    steps: int
    scale: float  # classifier-free guidance
    guidance: float | None  # embedded guidance
    size_multiple: int
    cfg_trunc_ratio: float = 1.0  # classifier-free guidance only while 1 - t / 1000 is below it
    renorm_cfg: float = 0.0  # largest norm of a guided prediction, in norms of the prompt's; 0: no limit
    is_distilled: bool = False  # to few steps: scripts that make more by default do not here


@dataclass(frozen=True, kw_only=True)
class Component:
    """A network as a folder inside a model folder of diffusers."""

    folder: str
    key_map: KeyMap = field(default_factory=make_identity_map)  # weights in that folder <-> module
    takes_lora: bool = True  # whether diffusers' pipeline loads LoRA for it
    comfyui_prefix: str = ""  # before its layers in adapter files for ComfyUI; empty: PartSpec.adapter_prefix


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What a model folder of diffusers says beyond the networks."""

    name: str  # diffusers' class
    networks: Mapping[str, Component]  # by part name
    scheduler: str  # diffusers' class
    scheduler_options: Mapping[str, Any]  # beside those of the objective
    tokenizers: tuple[str, ...]  # folders, in the order of the text encoders
    absent: tuple[str, ...] = ()  # arguments of the class that this model has nothing for
    options: Mapping[str, Any] = field(default_factory=dict)  # further entries of model_index.json


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What a checkpoint's headers say, before any weight is read."""

    source: Source
    title: str  # "Stable Diffusion 1.x", for reports
    base_model_version: str  # ss_base_model_version in adapter files
    architecture: str  # modelspec.architecture
    networks: Mapping[str, Network]  # by part name; the autoencoder under "vae"
    text_parts: tuple[str, ...]
    objective: Objective
    latents: LatentSpec
    lr_order: tuple[str, ...] = ()  # the text encoders that --text_encoder_lr counts, where the model lacks some
    adapter_text_lrs: int | None = None  # values of --text_encoder_lr that sd-scripts' adapters read; None: all
    checkpoint: tuple[str, ...] = ("denoiser",)  # the networks in a single file of this family
    inpaints: bool = False  # whether the denoiser sees a mask and the masked image, too
    masks_attention: bool = False  # whether the denoiser's attention is given a mask
    pipeline: Pipeline | None = None  # None: whole models are always saved as one file
    implementation: str = "diffusers"  # modelspec.implementation of adapter files
    checkpoint_implementation: str = ""  # and of whole models; empty: the same
    metadata: Mapping[str, Any] = field(default_factory=dict)  # ss_ keys that only this family's files have
    notes: tuple[str, ...] = ()  # warnings before the first step; errors with --strict
    declared: tuple[str, ...] = ()  # what the checkpoint says of itself and no option repeats

    @property
    def text_lr_order(self) -> tuple[str, ...]:
        """The text encoders that the values of --text_encoder_lr are for, those that this model lacks included."""
        return self.lr_order or self.text_parts

    @property
    def cached_parts(self) -> tuple[str, ...]:
        """The encoders whose files are not here, since their cached outputs are used."""
        return tuple(name for name, network in self.networks.items() if network.is_absent)

    def find_cached_tokenizer(self, part: str) -> Path | None:
        """The folder of the tokenizer of such an encoder; None for any other."""
        record = self.networks[part].record if part in self.networks else None
        return record.tokenizer if record else None

    def in_file(self, part: str) -> bool:
        """Whether a network is in the model's own checkpoint, or would be in a single file of it."""
        if self.source.is_folder:
            return part in self.checkpoint
        return self.networks[part].weights.file is self.source.file

    def with_dtype(self, parts: Collection[str], dtype: torch.dtype) -> Blueprint:
        """A copy that loads some networks in a dtype of their own."""
        changed = {name: replace(self.networks[name], dtype=dtype) for name in parts}
        return replace(self, networks={**self.networks, **changed})

    def without_weights(self, allocating: Callable[[], AbstractContextManager[None]] = nullcontext) -> Blueprint:
        """A copy whose networks are allocated and never read, for rehearsals; allocating: as of HeaderFile."""
        files: dict[int, HeaderFile] = {}  # by identity: networks in one file go on sharing it
        networks: dict[str, Network] = {}
        for name, network in self.networks.items():
            file = network.weights.file
            empty = files.setdefault(id(file), HeaderFile(file, allocating))
            networks[name] = replace(network, weights=replace(network.weights, file=empty))
        own = None if self.source.is_folder else files.get(id(self.source.file))
        return replace(self, source=replace(self.source, opened=own), networks=networks)
