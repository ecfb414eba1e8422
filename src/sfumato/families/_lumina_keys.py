"""Lumina-Image 2.0's transformer: key map, configuration, and where adapters go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.errors import UserError
from sfumato.families.base import PartSpec
from sfumato.formats.keymap import KeyMap, Rule

STACKS = ("layers", "noise_refiner", "context_refiner")  # the last is not modulated by time
PATCH = 2
MULTIPLE = 256  # the feed-forward layers' usual width is the next multiple of this from four times the model's on


def _block(stack: str) -> list[Rule]:
    plain = stack == "context_refiner"
    names = {
        "attention.out": "attn.to_out.0",
        "attention.q_norm": "attn.norm_q",
        "attention.k_norm": "attn.norm_k",
        **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)},
        "attention_norm1": "norm1" if plain else "norm1.norm",
        "attention_norm2": "norm2",
        "ffn_norm1": "ffn_norm1",
        "ffn_norm2": "ffn_norm2",
    }
    names |= {} if plain else {"adaLN_modulation.1": "norm1.linear"}
    at = f"{stack}.{{n}}."
    qkv = Rule(at + "attention.qkv", tuple(f"{at}attn.to_{x}" for x in "qkv"))
    return [qkv, *(Rule(at + original, (at + ours,)) for original, ours in names.items())]


RULES = (
    Rule("x_embedder", ("x_embedder",)),
    Rule("cap_embedder.{n}", ("time_caption_embed.caption_embedder.{n}",)),
    Rule("t_embedder.mlp.0", ("time_caption_embed.timestep_embedder.linear_1",)),
    Rule("t_embedder.mlp.2", ("time_caption_embed.timestep_embedder.linear_2",)),
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
    Rule("final_layer.linear", ("norm_out.linear_2",)),
    *(rule for stack in STACKS for rule in _block(stack)),
)
KEYS = KeyMap(RULES, drop=("norm_final.{*}",))  # a norm that published files have and nothing uses
EMBEDDERS = (  # x, t, cap
    "x_embedder",
    "time_caption_embed.timestep_embedder.{*}",
    "time_caption_embed.caption_embedder.1",
)
KINDS = {  # overlap: the first that is given decides
    "attn_dim": "{*}.attention.{*}",
    "mlp_dim": "{*}.feed_forward.{*}",
    "mod_dim": "{*}.adaLN_modulation.{*}",
    "refiner_dim": "noise_refiner.{*}|context_refiner.{*}",
}
CHOICES = {
    "transformer": "layers.{*}|final_layer.{*}",
    "refiners": "noise_refiner.{*}|context_refiner.{*}",
    "noise_refiner": "noise_refiner.{*}",
    "context_refiner": "context_refiner.{*}",
}


def spec(prefix: str) -> PartSpec:
    return PartSpec(
        name="denoiser",
        key_map=KEYS,
        key_prefix=prefix,
        adapter_map=KEYS,
        adapter_prefix="lora_unet",
        targets=(*(f"{stack}.{{n}}.{{*}}" for stack in STACKS), "norm_out.{*}"),
        extra_targets={"embedder_dims": EMBEDDERS},
        kinds=KINDS,
        choices={"train_blocks": CHOICES},
        counted={"train_block_indices": "layers.{n}.{*}"},
        blocks=tuple(f"{stack}.{{n}}" for stack in STACKS),
        rows=rows,
    )


def rows(original: str, shape: Sequence[int]) -> list[int]:
    """How a stacked weight falls apart: q has as many rows as the model is wide, k and v share the rest."""
    stacked, width = shape
    return [width, *[(stacked - width) // 2] * 2]


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Lumina2Transformer2DModel's configuration; any width, any number of blocks."""

    def count(stack: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(stack + ".")})

    width, patch = shapes["x_embedder.weight"]
    (head,) = shapes["layers.0.attention.q_norm.weight"]
    _, shared, _ = rows("", shapes["layers.0.attention.qkv.weight"])
    refiners = {count(stack) for stack in STACKS[1:]}
    if len(refiners) > 1:
        raise UserError("the checkpoint has unequal numbers of noise and context refiners")
    return {
        "in_channels": patch // PATCH**2,
        "hidden_size": width,
        "num_layers": count("layers"),
        "num_refiner_layers": refiners.pop(),
        "num_attention_heads": width // head,
        "num_kv_heads": shared // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dim_rope": [head // 3] * 3,
        **_feed_forward(width, shapes["layers.0.feed_forward.w1.weight"][0]),
    }


def _feed_forward(width: int, inner: int) -> dict[str, Any]:
    """The two numbers from which the network works out `inner`: the usual ones, or a pair that gives just that."""
    if inner == -(-4 * width // MULTIPLE) * MULTIPLE:
        return {"multiple_of": MULTIPLE, "ffn_dim_multiplier": None}
    return {"multiple_of": 1, "ffn_dim_multiplier": (inner + 0.5) / (4 * width)}  # it rounds down


def config_of_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def build(config: Mapping[str, Any]) -> Any:
    from diffusers.models.transformers.transformer_lumina2 import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel.from_config(dict(config))
