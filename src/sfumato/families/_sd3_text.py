"""Stable Diffusion 3's text encoders (CLIP-L, CLIP-G, T5-XXL): in the checkpoint, a file or a folder; features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions
from sfumato.data.batch import Tensors
from sfumato.errors import Problems, UserError
from sfumato.families import _clip, _open_clip, _t5, _tokenizers, _vae
from sfumato.families._file_kinds import (
    CHANNELS_FAULT,
    WIDTH_FAULT,
    check_network_size,
    make_missing_error,
    option_context,
)
from sfumato.families._text_features import cut_to_mask
from sfumato.families.blueprint import Blueprint, Component
from sfumato.families.part import Network, Part, PartSpec
from sfumato.families.source import Source, find_given
from sfumato.families.weights import Weights
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map

ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
PROJECTION = "text_projection.weight"
PROJECTED_KEYS = KeyMap(  # with or without the `text_model.` level
    [
        KeyRule("text_model.{*}", ("text_model.{*}",)),
        KeyRule(PROJECTION, (PROJECTION,)),
        KeyRule("{*}", ("text_model.{*}",)),
    ],
    (*_clip.UNUSED_KEYS, "logit_scale"),
    _clip.IMAGE_ENCODER_KEYS,
)


@dataclass(frozen=True, kw_only=True)
class EncoderLocation:
    """Where one encoder is."""

    option: str  # a file or folder of its own
    prefix: str  # in the checkpoint
    folder: str  # in a diffusers model


ENCODER_LOCATIONS = {
    "clip_l": EncoderLocation(option="clip_l", prefix="text_encoders.clip_l.transformer.", folder="text_encoder"),
    "clip_g": EncoderLocation(option="clip_g", prefix="text_encoders.clip_g.transformer.", folder="text_encoder_2"),
    "t5": EncoderLocation(option="t5xxl", prefix="text_encoders.t5xxl.transformer.", folder="text_encoder_3"),
}
ADAPTER_PREFIXES = {"clip_l": "lora_te1", "clip_g": "lora_te2"}
TEXT_COMPONENTS = {
    name: Component(
        folder=location.folder,
        key_map=make_identity_map() if name == "t5" else _clip.key_map(),
        takes_lora=name != "t5",
    )
    for name, location in ENCODER_LOCATIONS.items()
}


def read_others(
    source: Source, model: ModelOptions, denoiser: Network, scaling: Mapping[str, Any]
) -> dict[str, Network]:
    """Text encoders and autoencoder; T5 is optional, since the model was trained with zeros in its place, too.

    scaling: of the autoencoder. Raises UserError that names all that are missing.
    """
    problems = Problems()
    networks: dict[str, Network] = {}
    for name in ENCODER_LOCATIONS:
        with problems.catch():
            network = read_encoder(name, source, model)
            if network is None and name != "t5":
                raise make_missing_error(ENCODER_LOCATIONS[name].option, source.name)
            networks |= {name: network} if network else {}
    with problems.catch():
        networks["vae"] = _vae.find_vae(source, model, scaling)
    with problems.catch():
        if model.t5xxl_device:
            find_t5_device(model.t5xxl_device)
    problems.raise_all()
    check_encoders(denoiser, networks)
    vae = networks["vae"]
    channels = vae.config["latent_channels"]
    check_network_size("vae", vae.weights.file.header.path, CHANNELS_FAULT, channels, denoiser.config["in_channels"])
    return networks


def read_encoder(name: str, source: Source, model: ModelOptions) -> Network | None:
    """The encoder that the option names, else the checkpoint's own, else what stands for it; None where there is none.

    T5 is optional, so its cached outputs are used only where the options ask for it.
    """
    location = ENCODER_LOCATIONS[name]
    given = {"clip_l": model.clip_l, "clip_g": model.clip_g, "t5": model.t5xxl}[name]
    if given:
        with option_context(location.option):
            return replace(_read(name, find_given(source, name, given)), option=location.option)
    if source.has_network(location.folder):
        return replace(_read(name, Source(source.path / location.folder)), option=location.option)
    if source.find_prefix(location.prefix):
        return _read(name, source)
    is_wanted = name != "t5" or name in source.cached.chosen
    cached = source.find_cached(name) if is_wanted else None
    return replace(_read(name, cached), option=location.option) if cached else None


def check_encoders(denoiser: Network, networks: Mapping[str, Network]) -> None:
    """Raise UserError where the encoders' sizes are not those that the transformer was trained with."""
    clip_l, clip_g = (networks[name].config for name in ("clip_l", "clip_g"))
    pooled = sum(config["projection_dim"] for config in (clip_l, clip_g))
    if clip_l["hidden_size"] > clip_g["hidden_size"]:
        raise UserError("--clip_l is wider than --clip_g", code="clip-encoders-swapped", fix="swap the two files")
    if pooled != denoiser.config["pooled_projection_dim"]:
        widths = f"{clip_l['projection_dim']} + {clip_g['projection_dim']}"
        raise UserError(
            f"--clip_l and --clip_g are for another model: their pooled vectors have {widths} numbers, expected "
            f"{denoiser.config['pooled_projection_dim']}",
            code="clip-pooled-size-mismatch",
            fix="give CLIP-L and CLIP-G",
        )
    if "t5" in networks:
        t5 = networks["t5"]
        path, width = t5.weights.file.header.path, t5.config["d_model"]
        check_network_size("t5xxl", path, WIDTH_FAULT, width, denoiser.config["joint_attention_dim"])


def _read(name: str, source: Source) -> Network:
    file = source.open_lone()
    prefixed = any(key.startswith(ENCODER_LOCATIONS[name].prefix) for key in file.header.tensors)
    prefix = ENCODER_LOCATIONS[name].prefix if prefixed else ""
    if name == "t5":
        weights = _t5.find_weights(file, prefix)
        config = _t5.read_t5_config(source, weights)
        return Network(spec=make_spec(name), config=config, weights=weights)
    projected = prefix + PROJECTION in file.header.tensors
    weights = Weights(file=file, key_map=PROJECTED_KEYS if projected else _clip.CLIP_FILE_KEYS, prefix=prefix)
    config = _clip.read_clip_config(source, weights, activation=ACTIVATIONS[name])
    if projected and not source.is_folder:
        config["projection_dim"] = weights.read_shapes()[PROJECTION][0]
    return Network(spec=make_spec(name, projected=projected), config=config, weights=weights)


def make_spec(name: str, *, projected: bool = False) -> PartSpec:
    """projected: whether the file of a CLIP encoder has a projection; without one its encoder is built without, too."""
    prefix = ENCODER_LOCATIONS[name].prefix
    if name == "t5":
        return _t5.spec(prefix, names=("text_encoder_3",))
    names = _clip.CLIP_L_NAMES if name == "clip_l" else _open_clip.CLIP_G_NAMES
    if projected:
        return _open_clip.projected_spec(name, prefix, ADAPTER_PREFIXES[name], PROJECTED_KEYS, names=names)
    return _clip.spec(name, prefix, ADAPTER_PREFIXES[name], names=names)


def choose_builder(network: Network) -> Any:
    """The function that builds the encoder from its configuration."""
    if network.spec.name == "t5":
        return _t5.build
    return _open_clip.build_projected if network.spec.targets == _open_clip.TARGETS else _clip.build


def find_t5_device(name: str) -> torch.device:
    """Raises UserError for a name that is no device and for a device that this machine lacks."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise UserError(
            f"--t5xxl_device {name}: this machine has no such device", code="t5-device-missing", fix="cpu, or cuda:0"
        ) from error


def encode_clip(part: Part, tokenizer: Any, captions: Sequence[str], *, masked: bool) -> list[Tensors]:
    """hidden (77, D) and pooled (P,) of each caption; masked: hidden up to the end token, and a mask.

    Attention is causal, so no token sees the padding after the end token.
    """
    end, encoder = tokenizer.eos_token_id, part.module
    on_cpu = _clip.tokenize(tokenizer, captions, torch.device("cpu"))
    ids = on_cpu.to(part.device, non_blocking=True)
    if "text_projection" in dict(encoder.named_children()):
        hidden, pooled = _open_clip.encode_hidden_and_pooled(encoder, ids, end, layer=_clip.PENULTIMATE)
    else:
        hidden, last = _clip.encode_states(encoder, ids, layer=_clip.PENULTIMATE)
        pooled = _clip.take_at_end(last, ids, end)
    rows: list[Tensors] = [{"hidden": row} for row in hidden]
    if masked:
        ends = (on_cpu == end).int().argmax(dim=1)
        rows = cut_to_mask(hidden, torch.arange(on_cpu.shape[1]) <= ends[:, None])
    return [{"pooled": vector, **row} for vector, row in zip(pooled, rows, strict=True)]


def pad_features(features: Mapping[str, Tensor], length: int) -> Tensor:
    """(B, length, D) with zeros where the mask is False and where padding was cut."""
    hidden = features["hidden"]
    if "mask" in features:
        hidden = hidden.masked_fill(~features["mask"][..., None], 0)
    return nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))


def join_features(clip: Sequence[Tensor], t5: Tensor) -> Tensor:
    """(B, 77, D_l), (B, 77, D_g), (B, L, D) -> (B, 77 + L, D): both CLIPs' channels, zero-padded to D, then T5's."""
    text = torch.cat(list(clip), dim=-1)
    return torch.cat([nn.functional.pad(text, (0, t5.shape[-1] - text.shape[-1])), t5.to(text)], dim=1)


def load_sd3_tokenizers(blueprint: Blueprint, model: ModelOptions) -> dict[str, Any]:
    """Encoder -> its tokenizer; T5's where the model has it."""
    names = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
    folders = _clip.find_tokenizer_folders(blueprint, model, names)
    tokenizers: dict[str, Any] = {
        "clip_l": _tokenizers.load_clip_tokenizer(folders["clip_l"]),
        "clip_g": _tokenizers.load_clip_tokenizer(folders["clip_g"], pad_with_zero=True),
    }
    for name, tokenizer in tokenizers.items():
        _clip.check_vocabulary(tokenizer, blueprint.networks[name].config)
    if "t5" in blueprint.text_parts:
        folder = folders["t5"] or _tokenizers.find_in_hub_cache(_tokenizers.T5_ON_HUB)
        tokenizers["t5"] = _tokenizers.load_t5_tokenizer(folder)
    return tokenizers


def count_caption_tokens(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Of each caption, without begin and end tokens."""
    return _tokenizers.count_tokens(tokenizer, captions)
