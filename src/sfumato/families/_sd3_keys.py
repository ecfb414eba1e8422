"""Stable Diffusion 3's transformer: key map, configuration, adapter targets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfumato.common.layer_kinds import FEED_FORWARD, KEYS, QUERIES
from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.families._attention_norms import keep_attention_dtype
from sfumato.families._sd3_patches import SD3PatchEmbed
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import DENOISER_NAMES, DENOISER_PREFIX, Network, PartSpec
from sfumato.families.source import Source, drop_private_fields
from sfumato.families.weights import Weights
from sfumato.formats.controlled import ControlledLayer, LayerPattern, list_transformer_layers
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map

_HEAD_CHANNELS = 64  # in every published model
_BLOCK = "transformer_blocks.{n}."
_EMBEDDER_RULES = (
    KeyRule("pos_embed", ("pos_embed.pos_embed",)),
    KeyRule("x_embedder.proj", ("pos_embed.proj",)),
    KeyRule("context_embedder", ("context_embedder",)),
    KeyRule("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    KeyRule("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    KeyRule("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    KeyRule("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    KeyRule("final_layer.linear", ("proj_out",)),
    KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear",), "swap"),
)
_EMBEDDER_TARGETS = (  # context, t, x, y, final_mod, final_linear
    "context_embedder",
    "time_text_embed.timestep_embedder.{*}",
    "pos_embed.proj",
    "time_text_embed.text_embedder.{*}",
    "norm_out.linear",
    "proj_out",
)
_NORM_TARGETS = tuple(  # of 3.5; 3 has none with a weight
    f"{_BLOCK}{name}"
    for name in ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k", "attn2.norm_q", "attn2.norm_k")
)
_CONTEXT, _X = "joint_blocks.{n}.context_block.", "joint_blocks.{n}.x_block."
_RANK_KINDS = {
    "context_attn_dim": f"{_CONTEXT}attn.{{*}}|{_CONTEXT}attn2.{{*}}",
    "context_mlp_dim": f"{_CONTEXT}mlp.{{*}}",
    "context_mod_dim": f"{_CONTEXT}adaLN_modulation.{{*}}",
    "x_attn_dim": f"{_X}attn.{{*}}|{_X}attn2.{{*}}",
    "x_mlp_dim": f"{_X}mlp.{{*}}",
    "x_mod_dim": f"{_X}adaLN_modulation.{{*}}",
}


def key_map(blocks: int) -> KeyMap:
    """Original names <-> diffusers'. The last of `blocks` has scale and shift of its context norm swapped."""
    last = blocks - 1
    final = KeyRule(
        f"joint_blocks.{last}.context_block.adaLN_modulation.1",
        (f"transformer_blocks.{last}.norm1_context.linear",),
        "swap",
    )
    to_qkv, add_qkv = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    return KeyMap(
        [
            *_EMBEDDER_RULES,
            final,
            *_make_attention_rules(_X + "attn", _BLOCK + "attn", to_qkv, "to_out.0", "norm_{}"),
            *_make_attention_rules(_X + "attn2", _BLOCK + "attn2", to_qkv, "to_out.0", "norm_{}"),
            *_make_attention_rules(_CONTEXT + "attn", _BLOCK + "attn", add_qkv, "to_add_out", "norm_added_{}"),
            *_make_other_rules(_X, _BLOCK + "ff.", _BLOCK + "norm1.linear"),
            *_make_other_rules(_CONTEXT, _BLOCK + "ff_context.", _BLOCK + "norm1_context.linear"),
        ]
    )


def _make_attention_rules(original: str, ours: str, inputs: Iterable[str], output: str, norm: str) -> list[KeyRule]:
    return [
        KeyRule(f"{original}.qkv", tuple(f"{ours}.{name}" for name in inputs)),
        KeyRule(f"{original}.proj", (f"{ours}.{output}",)),
        *(KeyRule(f"{original}.ln_{name}", (f"{ours}.{norm.format(name)}",)) for name in "qk"),
    ]


def _make_other_rules(original: str, feed_forward: str, modulation: str) -> list[KeyRule]:
    return [
        KeyRule(original + "mlp.fc1", (feed_forward + "net.0.proj",)),
        KeyRule(original + "mlp.fc2", (feed_forward + "net.2",)),
        KeyRule(original + "adaLN_modulation.1", (modulation,)),
    ]


_CONTROLLED = (  # attn2: the image's own attention in the first blocks of 3.5 medium
    LayerPattern(layer_kind=QUERIES, paths=f"{_BLOCK}attn.to_q|{_BLOCK}attn2.to_q"),
    LayerPattern(layer_kind=KEYS, paths="|".join(f"{_BLOCK}{attn}.to_{x}" for attn in ("attn", "attn2") for x in "kv")),
    LayerPattern(layer_kind=FEED_FORWARD, paths=f"{_BLOCK}ff.net.0.proj"),
)


def list_sd3_layers(blueprint: Blueprint) -> Mapping[str, ControlledLayer]:
    """Those of the image's stream."""
    return list_transformer_layers(
        blueprint.networks["denoiser"].weights.read_shapes(), _CONTROLLED, blueprint.latents.token_side
    )


def spec(prefix: str, blocks: int) -> PartSpec:
    keys = key_map(blocks)
    return PartSpec(
        name="denoiser",
        key_map=keys,
        key_prefix=prefix,
        adapter_map=keys,
        adapter_prefix="lora_unet",
        adapter_names=DENOISER_NAMES,
        targets=(_BLOCK + "{*}",),
        extra_targets={"emb_dims": _EMBEDDER_TARGETS},
        norm_targets=_NORM_TARGETS,
        rank_kinds=_RANK_KINDS,
        block_indices={"train_block_indices": "joint_blocks.{n}.{*}"},
        blocks=(_BLOCK[:-1],),
        constant_tensors=("pos_embed.pos_embed",),
    )


def count_blocks(keys: Iterable[str], start: str) -> int:
    """Blocks of the transformer whose keys start with `start` and a number."""
    return len({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})


_CONTEXT_NORM = re.compile(  # in the original's and in diffusers' names, whatever program's prefix stands before
    r"(?:^|_)(?:joint_blocks_(\d+)_context_block_adaLN_modulation_1|transformer_blocks_(\d+)_norm1_context_linear)$"
)


def count_adapter_blocks(shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of blocks of an adapter file's model; 0 where the file does not adapt the last block's context norm.

    That norm has a third of the rows of the others. shapes: name in the file -> shape of the weight that it changes.
    """
    for name, shape in shapes.items():
        match = _CONTEXT_NORM.search(name.replace(".", "_"))
        if match and shape[0] == 2 * shape[1]:
            return 1 + int(match[1] or match[2])
    return 0


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """SD3Transformer2DModel's configuration from our names and shapes, without the resolution of its training.

    Only the table of positions depends on that, which checkpoints contain.
    """
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    joined, text = shapes["context_embedder.weight"]
    dual = {int(key.split(".")[1]) for key in shapes if key.startswith("transformer_blocks.") and ".attn2." in key}
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "attention_head_dim": _HEAD_CHANNELS,
        "num_attention_heads": width // _HEAD_CHANNELS,
        "joint_attention_dim": text,
        "caption_projection_dim": joined,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
    }


def read_sd3_transformer(source: Source) -> Network:
    """From a folder, or a file in original or diffusers' names."""
    if source.is_folder:
        config = drop_private_fields(source.read_config("transformer"))
        weights = Weights(file=source.open_weights("transformer"), key_map=make_identity_map())
        return Network(spec=spec(DENOISER_PREFIX, config["num_layers"]), config=config, weights=weights)
    prefix = source.find_prefix(DENOISER_PREFIX)
    blocks = count_blocks(source.shapes, prefix + "joint_blocks.")
    if blocks:
        weights = Weights(file=source.file, key_map=key_map(blocks), prefix=prefix)
    else:  # diffusers' names
        blocks = count_blocks(source.shapes, prefix + "transformer_blocks.")
        weights = Weights(file=source.file, key_map=make_identity_map(), prefix=prefix)
    return Network(spec=spec(prefix, blocks), config=config_from_shapes(weights.read_shapes()), weights=weights)


def get_version(config: Mapping[str, Any]) -> str:
    """sd-scripts' name of the model: medium, 5-medium (some blocks have two attentions) or 5-large."""
    if config["dual_attention_layers"]:
        return "5-medium"
    return "5-large" if config["qk_norm"] else "medium"


def build(config: Mapping[str, Any]) -> Any:
    """With the table of positions on the meta device: checkpoints contain it, and computing it takes gigabytes."""
    with without_bitsandbytes():
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    network: Any = SD3Transformer2DModel.from_config({**config, "pos_embed_max_size": 1})
    network.register_to_config(pos_embed_max_size=config["pos_embed_max_size"])
    network.pos_embed = SD3PatchEmbed(network.pos_embed.proj, size=config["pos_embed_max_size"])
    keep_attention_dtype(network)
    return network
