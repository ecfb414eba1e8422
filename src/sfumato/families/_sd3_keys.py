"""Stable Diffusion 3's transformer: key map, configuration, and where adapters go."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfumato.families._sd3_patches import Patches
from sfumato.families.base import PartSpec
from sfumato.formats.keymap import KeyMap, Rule

HEAD = 64  # channels of a head in every published model
BLOCK = "transformer_blocks.{n}."
EMBEDDERS = (
    Rule("pos_embed", ("pos_embed.pos_embed",)),
    Rule("x_embedder.proj", ("pos_embed.proj",)),
    Rule("context_embedder", ("context_embedder",)),
    *(
        Rule(f"{original}.mlp.{layer}", (f"time_text_embed.{ours}.linear_{number}",))
        for original, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
        for layer, number in ((0, 1), (2, 2))
    ),
    Rule("final_layer.linear", ("proj_out",)),
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), "swap"),
)
EMBEDDER_TARGETS = (  # context, t, x, y, final_mod, final_linear
    "context_embedder",
    "time_text_embed.timestep_embedder.{*}",
    "pos_embed.proj",
    "time_text_embed.text_embedder.{*}",
    "norm_out.linear",
    "proj_out",
)
KINDS = {
    f"{option}_{kind}_dim": "|".join(f"joint_blocks.{{n}}.{side}.{layer}.{{*}}" for layer in layers)
    for option, side in (("context", "context_block"), ("x", "x_block"))
    for kind, layers in (("attn", ("attn", "attn2")), ("mlp", ("mlp",)), ("mod", ("adaLN_modulation",)))
}


def key_map(blocks: int) -> KeyMap:
    """The last of `blocks` ends the text's way: its context norm has scale and shift in the other order."""
    last = blocks - 1
    final = Rule(
        f"joint_blocks.{last}.context_block.adaLN_modulation.1",
        (f"transformer_blocks.{last}.norm1_context.linear",),
        "swap",
    )
    picture, text = "joint_blocks.{n}.x_block.", "joint_blocks.{n}.context_block."
    return KeyMap(
        [
            *EMBEDDERS,
            final,
            *_attention(picture + "attn", BLOCK + "attn", ("to_q", "to_k", "to_v"), "to_out.0", "norm_{}"),
            *_attention(picture + "attn2", BLOCK + "attn2", ("to_q", "to_k", "to_v"), "to_out.0", "norm_{}"),
            *_attention(
                text + "attn",
                BLOCK + "attn",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                "to_add_out",
                "norm_added_{}",
            ),
            *_rest(picture, BLOCK + "ff.", BLOCK + "norm1.linear"),
            *_rest(text, BLOCK + "ff_context.", BLOCK + "norm1_context.linear"),
        ]
    )


def _attention(original: str, ours: str, inputs: Iterable[str], output: str, norm: str) -> list[Rule]:
    return [
        Rule(f"{original}.qkv", tuple(f"{ours}.{name}" for name in inputs)),
        Rule(f"{original}.proj", (f"{ours}.{output}",)),
        *(Rule(f"{original}.ln_{name}", (f"{ours}.{norm.format(name)}",)) for name in "qk"),
    ]


def _rest(original: str, feed_forward: str, modulation: str) -> list[Rule]:
    return [
        Rule(original + "mlp.fc1", (feed_forward + "net.0.proj",)),
        Rule(original + "mlp.fc2", (feed_forward + "net.2",)),
        Rule(original + "adaLN_modulation.1", (modulation,)),
    ]


def spec(prefix: str, blocks: int) -> PartSpec:
    keys = key_map(blocks)
    return PartSpec(
        name="denoiser",
        key_map=keys,
        key_prefix=prefix,
        adapter_map=keys,
        adapter_prefix="lora_unet",
        targets=(BLOCK + "{*}",),
        extra_targets={"emb_dims": EMBEDDER_TARGETS},
        kinds=KINDS,
        counted={"train_block_indices": "joint_blocks.{n}.{*}"},
        blocks=(BLOCK[:-1],),
        tables=("pos_embed.pos_embed",),
    )


def block_count(keys: Iterable[str], start: str) -> int:
    """Blocks of the transformer whose keys start with `start` and a number."""
    return len({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})


def blocks_of_adapter(shapes: Mapping[str, Sequence[int]]) -> int:
    """How many blocks a model has, told by the last one's context norm, whose adapter is a third as high as others'.

    0 where the file has none. shapes: name in an adapter file -> shape of the weight that it changes.
    """
    norm = re.compile(r"lora_unet_joint_blocks_(\d+)_context_block_adaLN_modulation_1")
    found = ((norm.fullmatch(name), shape) for name, shape in shapes.items())
    return next((1 + int(match[1]) for match, shape in found if match and shape[0] == 2 * shape[1]), 0)


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """SD3Transformer2DModel's configuration from our names and shapes; any number of blocks, of one or two attentions.

    The size of the pictures it was trained with is not in a checkpoint; only the table of positions, which is, would
    be made from it.
    """
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    joined, text = shapes["context_embedder.weight"]
    pairs = {int(key.split(".")[1]) for key in shapes if key.startswith("transformer_blocks.") and ".attn2." in key}
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": block_count(shapes, "transformer_blocks."),
        "attention_head_dim": HEAD,
        "num_attention_heads": width // HEAD,
        "joint_attention_dim": text,
        "caption_projection_dim": joined,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": sorted(pairs),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
    }


def config_of_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def kind_of(config: Mapping[str, Any]) -> str:
    """The field's name of the model: medium, 5-medium (some blocks attend twice) or 5-large."""
    if config["dual_attention_layers"]:
        return "5-medium"
    return "5-large" if config["qk_norm"] else "medium"


def build(config: Mapping[str, Any]) -> Any:
    """The table of positions stands on the meta device: checkpoints hold it, and making it costs gigabytes."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    network: Any = SD3Transformer2DModel.from_config({**config, "pos_embed_max_size": 1})
    network.register_to_config(pos_embed_max_size=config["pos_embed_max_size"])
    network.pos_embed = Patches(network.pos_embed.proj, size=config["pos_embed_max_size"])
    return network
