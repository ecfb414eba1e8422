"""What a file of weights holds, told by its keys: to refuse the wrong file for an option, saying what it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sfumato.errors import UserError

CLIP = "CLIP text encoder"
T5 = "T5 text encoder"
GEMMA2 = "Gemma 2 text encoder"
AUTOENCODER = "autoencoder"
NEEDED: dict[str, tuple[str, ...]] = {  # kind -> our names, without which it is none
    CLIP: ("embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    T5: ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    GEMMA2: ("embed_tokens.weight", "layers.0.pre_feedforward_layernorm.weight", "layers.0.self_attn.q_proj.weight"),
    AUTOENCODER: ("encoder.conv_in.weight", "decoder.conv_in.weight"),
}
FURTHER: dict[str, tuple[str, ...]] = {  # what else files hold -> endings of keys
    "OpenCLIP text encoder": ("transformer.resblocks.0.attn.in_proj_weight",),
    "part of a T5 text encoder": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "language model": ("layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight"),
}
DENOISERS = (  # endings of keys, each of another kind of image model's transformer or UNet
    *("double_blocks.0.img_attn.qkv.weight", "joint_blocks.0.x_block.attn.qkv.weight", "cap_embedder.1.weight"),
    *("transformer_blocks.0.attn.to_q.weight", "layers.0.attn.to_q.weight", "input_blocks.0.0.weight"),
    "down_blocks.0.resnets.0.time_emb_proj.weight",
)
WIDTH, LATENT = "its width is {}", "its latents have {} channels"
ADAPTERS = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".alpha", ".dora_scale")


def describe(keys: Collection[str]) -> str:
    """What the keys are those of, as part of a sentence; empty where nothing fits."""
    if not keys:
        return "an empty file"
    if any(key.endswith(ADAPTERS) for key in keys):
        return "an adapter (LoRA or the like)"
    kinds = (NEEDED | FURTHER).items()
    kind = next((kind for kind, wanted in kinds if all(_has(keys, ending) for ending in wanted)), "")
    if any(_has(keys, ending) for ending in DENOISERS):
        return "a whole image model" if kind else "the denoiser of an image model"
    article = "" if not kind or kind.startswith("part") else "an " if kind[0] in "aO" else "a "
    return article + kind


def require(kind: str, names: Collection[str], keys: Collection[str], place: object) -> None:
    """Raise UserError unless `names` (ours) are those of the kind; `keys` are the file's own, `place` its path."""
    if all(name in names for name in NEEDED[kind]):
        return
    found = describe(keys)
    raise UserError(
        f"{place} holds no {kind}" + (f"; it is {found}" if found else ""), fix=f"give the file or folder of the {kind}"
    )


@contextmanager
def told_of(option: str) -> Iterator[None]:
    """Have what is wrong with an option's file begin with the option; "" for none."""
    try:
        yield
    except UserError as error:
        if not option:
            raise
        raise UserError(f"--{option}: {error.what}", fix=error.fix) from error


def check_width(option: str, place: object, what: str, found: int, wanted: int) -> None:
    """Raise UserError where a network's numbers do not fit the model. what: such as WIDTH."""
    if found != wanted:
        raise UserError(
            f"--{option}: {place} is made for another model: {what.format(found)}, this one takes {wanted}",
            fix=f"give the --{option} that this model was trained with",
        )


class Found(dict[str, Any]):
    """Key -> shape of what a file holds; to ask for one that is missing is a UserError that names it."""

    def __init__(self, place: object, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.place = place

    def __missing__(self, key: str) -> Sequence[int]:
        raise UserError(f"{self.place} lacks {key}", fix="download it again, or choose another version of it")


def _has(keys: Collection[str], ending: str) -> bool:
    return ending in keys or any(key.endswith("." + ending) for key in keys)
