"""Stable Diffusion 3's text encoders: CLIP-L, CLIP-G and T5-XXL, each in the checkpoint, in a file or in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions
from sfumato.data.batch import Tensors
from sfumato.errors import UserError
from sfumato.families import _clip, _open_clip, _t5
from sfumato.families._file_kinds import WIDTH, check_width, told_of
from sfumato.families.base import Component, Network, PartSpec
from sfumato.families.source import Source, Weights, find_path
from sfumato.formats.keymap import KeyMap, Rule, identity

LAYER = 2  # from the end: both CLIP towers are read before their last layer, without the final norm
ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
PROJECTION = "text_projection.weight"
PROJECTED_KEYS = KeyMap(  # with or without the `text_model.` level
    [Rule("text_model.{*}", ("text_model.{*}",)), Rule(PROJECTION, (PROJECTION,)), Rule("{*}", ("text_model.{*}",))],
    (*_clip.DROP, "logit_scale"),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one encoder lies."""

    option: str  # a file or folder of its own
    prefix: str  # in the checkpoint
    folder: str  # in a diffusers model
    adapter_prefix: str


PLACES = {
    "clip_l": Place(
        option="clip_l",
        prefix="text_encoders.clip_l.transformer.",
        folder="text_encoder",
        adapter_prefix="lora_te1",
    ),
    "clip_g": Place(
        option="clip_g",
        prefix="text_encoders.clip_g.transformer.",
        folder="text_encoder_2",
        adapter_prefix="lora_te2",
    ),
    "t5": Place(
        option="t5xxl",
        prefix="text_encoders.t5xxl.transformer.",
        folder="text_encoder_3",
        adapter_prefix="lora_te3",
    ),
}

COMPONENTS = {
    name: Component(
        folder=place.folder, key_map=identity() if name == "t5" else _clip.key_map(), takes_lora=name != "t5"
    )
    for name, place in PLACES.items()
}


def read(name: str, source: Source, model: ModelOptions) -> Network | None:
    """The encoder that the option names, else the checkpoint's own; None where there is neither."""
    place = PLACES[name]
    given = {"clip_l": model.clip_l, "clip_g": model.clip_g, "t5": model.t5xxl}[name]
    if given:
        with told_of(place.option):
            return replace(_read(name, Source(find_path(given))), option=place.option)
    if source.is_folder:
        return _read(name, Source(source.path / place.folder)) if source.has(place.folder) else None
    return _read(name, source) if any(key.startswith(place.prefix) for key in source.shapes) else None


def check(denoiser: Network, found: Mapping[str, Network]) -> None:
    """Raise UserError where the encoders are not those that the transformer was trained with."""
    clip_l, clip_g = (found[name].config for name in ("clip_l", "clip_g"))
    pooled = sum(config["projection_dim"] for config in (clip_l, clip_g))
    if clip_l["hidden_size"] > clip_g["hidden_size"]:
        raise UserError("--clip_l is wider than --clip_g", fix="swap the two files")
    if pooled != denoiser.config["pooled_projection_dim"]:
        widths = f"{clip_l['projection_dim']} + {clip_g['projection_dim']}"
        raise UserError(
            f"--clip_l and --clip_g are not those of this model: their pooled vectors have {widths} numbers, "
            f"{denoiser.config['pooled_projection_dim']} are expected",
            fix="give CLIP-L and CLIP-G",
        )
    if "t5" in found:
        place, width = found["t5"].weights.file.header.path, found["t5"].config["d_model"]
        check_width("t5xxl", place, WIDTH, width, denoiser.config["joint_attention_dim"])


def missing(name: str, source: Source) -> UserError:
    option = PLACES[name].option
    return UserError(f"--{option} is missing: {source.name} holds no such text encoder", fix=f"--{option} FILE")


def _read(name: str, source: Source) -> Network:
    file = source.component()
    prefixed = any(key.startswith(PLACES[name].prefix) for key in file.header.tensors)
    prefix = PLACES[name].prefix if prefixed else ""
    if name == "t5":
        weights = Weights(file=file, key_map=_t5.key_map(), prefix=prefix, tied=_t5.TIED)
        config = _t5.read_config(source, weights)
        return Network(spec=t5_spec(), config=config, weights=weights)
    projected = prefix + PROJECTION in file.header.tensors
    weights = Weights(file=file, key_map=PROJECTED_KEYS if projected else _clip.FILE_KEYS, prefix=prefix)
    config = _clip.read_config(source, weights, activation=ACTIVATIONS[name])
    if projected and not source.is_folder:
        config["projection_dim"] = weights.shapes()[PROJECTION][0]
    return Network(spec=clip_spec(name, projected=projected), config=config, weights=weights)


def clip_spec(name: str, *, projected: bool) -> PartSpec:
    """A file without a projection means the identity; its encoder is built without one."""
    names = identity() if projected else _clip.key_map()
    return PartSpec(
        name=name,
        key_map=PROJECTED_KEYS if projected else names,
        key_prefix=PLACES[name].prefix,
        adapter_map=names,
        adapter_prefix=PLACES[name].adapter_prefix,
        targets=_open_clip.TARGETS if projected else _clip.TARGETS,
        blocks=_open_clip.BLOCKS if projected else _clip.BLOCKS,
    )


def t5_spec() -> PartSpec:
    return PartSpec(
        name="t5",
        key_map=_t5.key_map(),
        key_prefix=PLACES["t5"].prefix,
        adapter_map=_t5.key_map(),
        adapter_prefix=PLACES["t5"].adapter_prefix,
        targets=_t5.TARGETS,
        blocks=_t5.BLOCKS,
        opt_in="train_t5xxl",
    )


def builder(network: Network) -> Any:
    """What builds the encoder from its configuration."""
    if network.spec.name == "t5":
        return _t5.build
    return _open_clip.build_projected if network.spec.targets == _open_clip.TARGETS else _clip.build


def clip_features(encoder: nn.Module, tokenizer: Any, captions: Sequence[str], *, masked: bool) -> list[Tensors]:
    """hidden (77, D) and pooled (P,) of each caption; `masked`: hidden and a mask up to the end token alone.

    Padding stands behind the end token, where no other token of CLIP can see it.
    """
    tower: Any = encoder
    end = tokenizer.eos_token_id
    ids = _clip.token_ids(tokenizer, captions, tower.device)
    if "text_projection" in dict(tower.named_children()):
        hidden, pooled = _open_clip.hidden_and_pooled(tower, ids, end, layer=LAYER)
    else:
        hidden, last = _clip.states(tower, ids, layer=LAYER)
        pooled = _clip.at_first_end(last, ids, end)
    lengths = ((ids == end).int().argmax(dim=1) + 1).tolist() if masked else [None] * len(ids)
    return [
        {"pooled": vector, **cut(states, length)}
        for states, vector, length in zip(hidden, pooled, lengths, strict=True)
    ]


def t5_features(
    encoder: nn.Module, tokenizer: Any, captions: Sequence[str], length: int, *, masked: bool
) -> list[Tensors]:
    """hidden (length, D) of each caption; `masked`: padding is not attended to and cut off, a mask tells how much."""
    tower: Any = encoder
    ids, real = _t5.token_ids(tokenizer, captions, length, tower.device)
    hidden = _t5.hidden_states(tower, ids, real if masked else None)
    lengths = real.sum(1).tolist() if masked else [None] * len(ids)
    return [cut(states, number) for states, number in zip(hidden, lengths, strict=True)]


def cut(hidden: Tensor, length: int | None) -> Tensors:
    """All of (L, D), or its first rows and the mask that says so once it is padded again."""
    if length is None:
        return {"hidden": hidden}
    return {"hidden": hidden[:length], "mask": torch.ones(length, dtype=torch.bool, device=hidden.device)}


def filled(features: Mapping[str, Tensor], length: int) -> Tensor:
    """(B, length, D): what was padding is zeros, whatever stands there; so is what was cut off."""
    hidden = features["hidden"]
    if "mask" in features:
        hidden = hidden.masked_fill(~features["mask"][..., None], 0)
    return nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))


def joined(clip: Sequence[Tensor], t5: Tensor) -> Tensor:
    """(B, 77, D_l), (B, 77, D_g), (B, L, D) -> (B, 77 + L, D): CLIP's side by side, filled up with zeros, then T5's."""
    text = torch.cat(list(clip), dim=-1)
    return torch.cat([nn.functional.pad(text, (0, t5.shape[-1] - text.shape[-1])), t5.to(text)], dim=1)
