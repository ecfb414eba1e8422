"""The files of FLUX.1 and models made from it: the transformer in any layout, T5, the autoencoder, tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.families import _clip, _t5, _tokenizers, _vae
from sfumato.families._file_kinds import (
    CHANNELS_FAULT,
    WIDTH_FAULT,
    check_input_channels,
    check_network_size,
    option_context,
)
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import DENOISER_PREFIX, Network, PartSpec, RowSplit
from sfumato.families.source import MODEL_INDEX, Source, drop_private_fields, read_json
from sfumato.families.weights import Weights
from sfumato.formats.keymap import KeyMap, make_identity_map

CLIP_L_IN_WHOLE = "text_encoders.clip_l.transformer."  # in ComfyUI's files of whole models
T5_IN_WHOLE = "text_encoders.t5xxl.transformer."
_FILL = (
    6  # inputs of FLUX.1 Fill in those of the plain model: latents, the masked image's, four times as many of a mask
)
_VARIANTS = {2: "FLUX.1 Canny or Depth", _FILL: "FLUX.1 Fill"}  # by the inputs in those of the plain model
FLUX_VAE_SCALING = {"scaling_factor": 0.3611, "shift_factor": 0.1159}  # which the autoencoder's file does not contain


def is_kontext(source: Source) -> bool:
    """Whether a model folder or a file's metadata says that it is FLUX.1 Kontext; its keys are those of FLUX.1 dev."""
    if not source.is_folder:
        return "kontext" in source.file.header.metadata.get("modelspec.architecture", "").lower()
    index = source.path / MODEL_INDEX
    return index.is_file() and "Kontext" in str(read_json(index).get("_class_name"))


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """How the files of one transformer are recognized and read."""

    class_name: str  # in diffusers
    required_keys: tuple[str, ...]  # original keys that together no other model has
    keys: KeyMap
    row_split: RowSplit
    spec: Callable[[str], PartSpec]  # from the prefix of its keys
    config: Callable[[Mapping[str, Sequence[int]]], dict[str, Any]]  # from original keys' shapes
    may_inpaint: bool = False  # whether there is a variant that sees a mask and the masked image

    def is_in(self, source: Source) -> bool:
        """Whether a file in original or diffusers' names, or a folder of diffusers, contains this transformer."""
        if source.is_folder:
            folder = _find_folder(source)
            return folder != "" and source.read_config(folder).get("_class_name") == self.class_name
        shapes = source.strip_prefix(source.find_prefix(DENOISER_PREFIX))
        return all(key in shapes for key in self.required_keys) or self._has_diffusers_names(shapes)

    def read(self, source: Source) -> Network:
        """The transformer of a source for which `is_in` is true. Raises UserError for one with further inputs."""
        network = self._read(source)
        if self.may_inpaint and inpaints(network):
            return network
        channels, latents = network.config["in_channels"], count_outputs(network)
        variant = _VARIANTS.get(channels // latents, "another kind of input")
        check_input_channels(source.name, channels, latents, variant)
        return network

    def _read(self, source: Source) -> Network:
        if source.is_folder:
            folder = _find_folder(source)
            config = drop_private_fields(source.read_config(folder))
            return self._make_diffusers_network(source.open_weights(folder), config)
        prefix = source.find_prefix(DENOISER_PREFIX)
        shapes = source.strip_prefix(prefix)
        if self._has_diffusers_names(shapes):
            config = self.config(self.keys.rename_shapes(shapes))
            return self._make_diffusers_network(source.file, config)
        weights = Weights(file=source.file, key_map=self.keys, prefix=prefix, row_split=self.row_split)
        return Network(spec=self.spec(prefix), config=self.config(shapes), weights=weights)

    def _has_diffusers_names(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        ours = [self.keys.find_ours(key) for key in self.required_keys]
        return all(names is not None and names[0][0] in shapes for names in ours)

    def _make_diffusers_network(self, file: Any, config: dict[str, Any]) -> Network:
        return Network(spec=self.spec(""), config=config, weights=Weights(file=file, key_map=make_identity_map()))


def count_outputs(denoiser: Network) -> int:
    """Numbers that the transformer gives for each token: four latent pixels'."""
    return denoiser.config.get("out_channels") or denoiser.config["in_channels"]


def inpaints(denoiser: Network) -> bool:
    """Whether the transformer is that of FLUX.1 Fill."""
    return denoiser.config["in_channels"] == _FILL * count_outputs(denoiser)


def _find_folder(source: Source) -> str:
    """The transformer's folder in a whole model, "." where the source is that folder, else an empty text."""
    return next((name for name in ("transformer", ".") if source.has_network(name)), "")


def read_clip_l(source: Source, denoiser: Network, make_spec: Callable[[str], PartSpec]) -> Network:
    """Raises UserError for a file of another kind, and for an encoder of another width than the model's."""
    with option_context("clip_l"):
        prefix = source.find_prefix(CLIP_L_IN_WHOLE)
        weights = Weights(file=source.open_lone(), key_map=_clip.CLIP_FILE_KEYS, prefix=prefix)
        config = _clip.read_clip_config(source, weights)
    check_network_size(
        "clip_l", source.path, WIDTH_FAULT, config["hidden_size"], denoiser.config["pooled_projection_dim"]
    )
    return Network(spec=make_spec(prefix), config=config, weights=weights, option="clip_l")


def read_t5(source: Source, denoiser: Network, make_spec: Callable[[str], PartSpec]) -> Network:
    """Raises UserError for a file of another kind, and for an encoder of another width than the model's."""
    with option_context("t5xxl"):
        prefix = source.find_prefix(T5_IN_WHOLE)
        weights = _t5.find_weights(source.open_lone(), prefix)
        config = _t5.read_t5_config(source, weights)
    check_network_size("t5xxl", source.path, WIDTH_FAULT, config["d_model"], denoiser.config["joint_attention_dim"])
    return Network(spec=make_spec(prefix), config=config, weights=weights, option="t5xxl")


def read_flux_vae(source: Source, denoiser: Network) -> Network:
    """Raises UserError for a file of another kind, and for latents of another size than the model's."""
    vae = _vae.read_vae_option(source, FLUX_VAE_SCALING, option="ae")
    check_network_size("ae", source.path, CHANNELS_FAULT, vae.config["latent_channels"], count_outputs(denoiser) // 4)
    return vae


def find_tokenizer_folder(blueprint: Blueprint, part: str, given: str | None, name: str) -> Path | None:
    """--tokenizer's value, else the folder of that name in the diffusers model or beside the checkpoint.

    Else the one that the cache keeps where it stands for the encoder.
    """
    if given:
        return Path(given)
    source = blueprint.source
    beside = source.path if source.is_folder else source.path.parent
    return beside / name if (beside / name).is_dir() else blueprint.find_cached_tokenizer(part)


def find_t5_tokenizer(blueprint: Blueprint, given: str | None, name: str) -> Any:
    """From `find_tokenizer_folder`, else from the hub's cache."""
    folder = find_tokenizer_folder(blueprint, "t5", given, name) or _tokenizers.find_in_hub_cache(_tokenizers.T5_ON_HUB)
    return _tokenizers.load_t5_tokenizer(folder)
