"""What a file of weights contains, by its keys; errors for a wrong file say what it is instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.families._other_models import name_other_model

CLIP_ENCODER = "CLIP text encoder"
T5_ENCODER = "T5 text encoder"
GEMMA2_ENCODER = "Gemma 2 text encoder"
AUTOENCODER = "autoencoder"
_REQUIRED_NAMES: dict[str, tuple[str, ...]] = {  # kind -> our names that every file of it has
    CLIP_ENCODER: ("embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    T5_ENCODER: ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    GEMMA2_ENCODER: (
        "embed_tokens.weight",
        "layers.0.pre_feedforward_layernorm.weight",
        "layers.0.self_attn.q_proj.weight",
    ),
    AUTOENCODER: ("encoder.conv_in.weight", "decoder.conv_in.weight"),
}
_OTHER_KINDS: dict[str, tuple[str, ...]] = {  # what other files contain -> endings of keys
    "OpenCLIP text encoder": ("transformer.resblocks.0.attn.in_proj_weight",),
    "part of a T5 text encoder": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "language model": ("layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight"),
    "image encoder (CLIP)": ("vision_model.encoder.layers.0.self_attn.q_proj.weight",),
}
_DENOISER_KEYS = (  # endings of keys, one for each kind of image model's transformer or UNet
    *("double_blocks.0.img_attn.qkv.weight", "joint_blocks.0.x_block.attn.qkv.weight", "cap_embedder.1.weight"),
    *("transformer_blocks.0.attn.to_q.weight", "layers.0.attn.to_q.weight", "input_blocks.0.0.weight"),
    "down_blocks.0.resnets.0.time_emb_proj.weight",
)
WIDTH_FAULT, CHANNELS_FAULT = "its width is {}", "its latents have {} channels"
_ADAPTER_KEYS = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".alpha", ".dora_scale")


def describe_keys(keys: Collection[str]) -> str:
    """What has these keys, as part of a sentence; empty where that is unknown."""
    if not keys:
        return "an empty file"
    if any(key.endswith(_ADAPTER_KEYS) for key in keys):
        return "an adapter (LoRA or the like)"
    other = name_other_model(keys)
    if other:
        return other
    kind = ""
    for name, endings in (_REQUIRED_NAMES | _OTHER_KINDS).items():
        if all(_has_ending(keys, ending) for ending in endings):
            kind = name
            break
    if any(_has_ending(keys, ending) for ending in _DENOISER_KEYS):
        return "a whole image model" if kind else "the denoiser of an image model"
    article = "" if not kind or kind.startswith("part") else "an " if kind[0] in "aO" else "a "
    return article + kind


def require_kind(kind: str, names: Collection[str], keys: Collection[str], place: object) -> None:
    """Raise UserError unless `names` (ours) are those of the kind. keys: of the file. place: its path."""
    if all(name in names for name in _REQUIRED_NAMES[kind]):
        return
    actual = describe_keys(keys)
    raise UserError(
        f"{place} is no {kind}" + (f" but {actual}" if actual else ""),
        code="network-kind-mismatch",
        fix=f"give the file or folder of the {kind}",
    )


@contextmanager
def option_context(option: str) -> Iterator[None]:
    """Put the option before the message of a UserError about its file; "" for no option."""
    try:
        yield
    except UserError as error:
        if not option:
            raise
        raise UserError(f"--{option}: {error.what}", code=error.code, fix=error.fix) from error


def make_missing_error(option: str, place: object) -> UserError:
    """The error for a network that neither its option nor the model provides. place: the model's path or name."""
    return UserError(
        f"--{option} is missing: {place} holds no such network", code="network-file-missing", fix=f"--{option} FILE"
    )


def check_network_size(option: str, place: object, what: str, found: int, wanted: int) -> None:
    """Raise UserError where a network's size does not fit the model. what: WIDTH_FAULT or CHANNELS_FAULT."""
    if found != wanted:
        raise UserError(
            f"--{option}: {place} is for another model: {what.format(found)}, this model expects {wanted}",
            code="network-size-mismatch",
            fix=f"give the --{option} that this model was trained with",
        )


def check_input_channels(place: object, found: int, latents: int, variant: str) -> None:
    """Raise UserError where a denoiser sees more channels than latents have. variant: what such a checkpoint is."""
    if found != latents:
        raise UserError(
            f"{place}: denoisers with {plural(found, 'input channel')} instead of {latents} ({variant}) are not "
            "supported",
            code="denoiser-variant-unsupported",
            fix="start from the plain text-to-image checkpoint",
        )


def make_missing_text_error(place: object, encoders: Sequence[str]) -> UserError:
    """The error for a checkpoint of a model without options for text encoders that was saved without them."""
    return UserError(
        f"{place} lacks its text encoder ({' and '.join(encoders)}): it was saved without",
        code="text-encoder-missing",
        fix="give the whole checkpoint; a denoiser alone cannot be trained",
    )


class ShapeTable(dict[str, Any]):
    """Key -> shape of a file's tensors; a key that is missing raises UserError with its name."""

    def __init__(self, place: object, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.place = place

    def __missing__(self, key: str) -> Sequence[int]:
        raise UserError(
            f"{self.place} lacks {key}",
            code="network-key-missing",
            fix="download it again, or choose another version of it",
        )


def _has_ending(keys: Collection[str], ending: str) -> bool:
    return ending in keys or any(key.endswith("." + ending) for key in keys)
