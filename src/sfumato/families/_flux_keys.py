"""FLUX.1's transformer: key map, configuration, adapter targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sfumato.common.layer_kinds import FEED_FORWARD, KEYS, QUERIES
from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.families._attention_norms import keep_attention_dtype
from sfumato.families._flux_files import Transformer
from sfumato.families._flux_parts import keep_time_exact
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import DENOISER_NAMES, PartSpec
from sfumato.formats.controlled import ControlledLayer, LayerPattern, list_transformer_layers
from sfumato.formats.keymap import KeyMap, KeyRule

DOUBLE, SINGLE = "transformer_blocks.{n}.", "single_transformer_blocks.{n}."
BLOCK_RULES = (  # and the layers before and after the blocks
    KeyRule("img_in", ("x_embedder",)),
    KeyRule("txt_in", ("context_embedder",)),
    KeyRule("final_layer.linear", ("proj_out",)),
    KeyRule("double_blocks.{n}.img_attn.qkv", tuple(f"{DOUBLE}attn.to_{x}" for x in "qkv")),
    KeyRule("double_blocks.{n}.txt_attn.qkv", tuple(f"{DOUBLE}attn.add_{x}_proj" for x in "qkv")),
    KeyRule("double_blocks.{n}.img_attn.norm.query_norm.scale", (f"{DOUBLE}attn.norm_q.weight",)),
    KeyRule("double_blocks.{n}.img_attn.norm.key_norm.scale", (f"{DOUBLE}attn.norm_k.weight",)),
    KeyRule("double_blocks.{n}.txt_attn.norm.query_norm.scale", (f"{DOUBLE}attn.norm_added_q.weight",)),
    KeyRule("double_blocks.{n}.txt_attn.norm.key_norm.scale", (f"{DOUBLE}attn.norm_added_k.weight",)),
    KeyRule("double_blocks.{n}.img_attn.proj", (f"{DOUBLE}attn.to_out.0",)),
    KeyRule("double_blocks.{n}.txt_attn.proj", (f"{DOUBLE}attn.to_add_out",)),
    KeyRule("double_blocks.{n}.img_mlp.0", (f"{DOUBLE}ff.net.0.proj",)),
    KeyRule("double_blocks.{n}.img_mlp.2", (f"{DOUBLE}ff.net.2",)),
    KeyRule("double_blocks.{n}.txt_mlp.0", (f"{DOUBLE}ff_context.net.0.proj",)),
    KeyRule("double_blocks.{n}.txt_mlp.2", (f"{DOUBLE}ff_context.net.2",)),
    KeyRule("single_blocks.{n}.linear1", (*(f"{SINGLE}attn.to_{x}" for x in "qkv"), f"{SINGLE}proj_mlp")),
    KeyRule("single_blocks.{n}.linear2", (f"{SINGLE}proj_out",)),
    KeyRule("single_blocks.{n}.norm.query_norm.scale", (f"{SINGLE}attn.norm_q.weight",)),
    KeyRule("single_blocks.{n}.norm.key_norm.scale", (f"{SINGLE}attn.norm_k.weight",)),
    # the same layers without their parameter, for names in adapter files
    KeyRule("double_blocks.{n}.img_attn.norm.query_norm", (f"{DOUBLE}attn.norm_q",)),
    KeyRule("double_blocks.{n}.img_attn.norm.key_norm", (f"{DOUBLE}attn.norm_k",)),
    KeyRule("double_blocks.{n}.txt_attn.norm.query_norm", (f"{DOUBLE}attn.norm_added_q",)),
    KeyRule("double_blocks.{n}.txt_attn.norm.key_norm", (f"{DOUBLE}attn.norm_added_k",)),
    KeyRule("single_blocks.{n}.norm.query_norm", (f"{SINGLE}attn.norm_q",)),
    KeyRule("single_blocks.{n}.norm.key_norm", (f"{SINGLE}attn.norm_k",)),
)
MODULATION_RULES = (
    KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear",), "swap"),
    KeyRule("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    KeyRule("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    KeyRule("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    KeyRule("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    KeyRule("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    KeyRule("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    KeyRule("double_blocks.{n}.img_mod.lin", (f"{DOUBLE}norm1.linear",)),
    KeyRule("double_blocks.{n}.txt_mod.lin", (f"{DOUBLE}norm1_context.linear",)),
    KeyRule("single_blocks.{n}.modulation.lin", (f"{SINGLE}norm.linear",)),
)
FLUX_KEYS = KeyMap((*BLOCK_RULES, *MODULATION_RULES))
XLABS_KEYS = KeyMap(  # XLabs' names of what it adapts: 1 is the image, 2 the text
    [
        KeyRule("double_blocks.{n}.processor.qkv_lora1", tuple(f"{DOUBLE}attn.to_{x}" for x in "qkv")),
        KeyRule("double_blocks.{n}.processor.qkv_lora2", tuple(f"{DOUBLE}attn.add_{x}_proj" for x in "qkv")),
        KeyRule("double_blocks.{n}.processor.proj_lora1", (f"{DOUBLE}attn.to_out.0",)),
        KeyRule("double_blocks.{n}.processor.proj_lora2", (f"{DOUBLE}attn.to_add_out",)),
        KeyRule("single_blocks.{n}.qkv", tuple(f"{SINGLE}attn.to_{x}" for x in "qkv")),
        KeyRule("single_blocks.{n}.proj", (f"{SINGLE}proj_out",)),
    ]
)
_OTHER_TARGETS = ("norm_out.linear", "proj_out")
_NORM_TARGETS = (
    *(f"{DOUBLE}attn.norm_{name}" for name in ("q", "k", "added_q", "added_k")),
    *(f"{SINGLE}attn.norm_{name}" for name in "qk"),
)
_IN_TARGETS = (  # img, time, vector, guidance, txt
    "x_embedder",
    "time_text_embed.timestep_embedder.{*}",
    "time_text_embed.text_embedder.{*}",
    "time_text_embed.guidance_embedder.{*}",
    "context_embedder",
)
BLOCK_RANK_KINDS = {
    **{f"{x}_attn_dim": f"double_blocks.{{n}}.{x}_attn.{{*}}" for x in ("img", "txt")},
    **{f"{x}_mlp_dim": f"double_blocks.{{n}}.{x}_mlp.{{*}}" for x in ("img", "txt")},
    "single_dim": "single_blocks.{n}.linear{n}",
}
MODULATION_RANK_KINDS = {
    **{f"{x}_mod_dim": f"double_blocks.{{n}}.{x}_mod.{{*}}" for x in ("img", "txt")},
    "single_mod_dim": "single_blocks.{n}.modulation.{*}",
}


def spec(prefix: str) -> PartSpec:
    made = make_part_spec(prefix, FLUX_KEYS, _IN_TARGETS, BLOCK_RANK_KINDS | MODULATION_RANK_KINDS)
    note = "InvokeAI does not recognize LoRA files that adapt the layers of in_dims"
    return replace(made, reader_notes={"|".join(_IN_TARGETS): note})


def make_part_spec(prefix: str, keys: KeyMap, in_targets: tuple[str, ...], kinds: Mapping[str, str]) -> PartSpec:
    """Of a transformer with two kinds of blocks, which are adapted. kinds: PartSpec.rank_kinds."""
    return PartSpec(
        name="denoiser",
        key_map=keys,
        key_prefix=prefix,
        adapter_map=keys,
        adapter_prefix="lora_unet",
        adapter_names=DENOISER_NAMES,
        adapter_aliases=(XLABS_KEYS,),
        targets=(DOUBLE + "{*}", SINGLE + "{*}"),
        extra_targets={"in_dims": in_targets},
        other_targets=_OTHER_TARGETS,
        norm_targets=_NORM_TARGETS,
        rank_kinds=kinds,
        block_choices={"train_blocks": {"double": "double_blocks.{*}", "single": "single_blocks.{*}"}},
        block_indices={
            "train_double_block_indices": "double_blocks.{n}.{*}",
            "train_single_block_indices": "single_blocks.{n}.{*}",
        },
        blocks=(DOUBLE[:-1], SINGLE[:-1]),
        row_split=split_flux_rows,
    )


_CONTROLLED = (
    LayerPattern(layer_kind=QUERIES, paths=f"{DOUBLE}attn.to_q"),
    LayerPattern(layer_kind=KEYS, paths=f"{DOUBLE}attn.to_k|{DOUBLE}attn.to_v"),
    LayerPattern(layer_kind=FEED_FORWARD, paths=f"{DOUBLE}ff.net.0.proj"),
    LayerPattern(layer_kind=QUERIES, paths=f"{SINGLE}attn.to_q", follows_text=True),
    LayerPattern(layer_kind=KEYS, paths=f"{SINGLE}attn.to_k|{SINGLE}attn.to_v", follows_text=True),
    LayerPattern(layer_kind=FEED_FORWARD, paths=f"{SINGLE}proj_mlp", follows_text=True),
)


def list_flux_layers(blueprint: Blueprint) -> Mapping[str, ControlledLayer]:
    """Of FLUX.1's transformer and those with its blocks."""
    return list_transformer_layers(
        blueprint.networks["denoiser"].weights.read_shapes(), _CONTROLLED, blueprint.latents.token_side
    )


def split_flux_rows(original: str, shape: Sequence[int]) -> list[int]:
    """Rows of the layers in a stacked weight: q, k, v, and where there are more rows the MLP's.

    Of a bias, or with 0 columns for a number that is not known: the MLP is four times as wide as the model.
    """
    if "linear1." in original:
        width = shape[1] if len(shape) > 1 and shape[1] else shape[0] // 7
        return [width, width, width, shape[0] - 3 * width]
    return [shape[0] // 3] * 3


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """FluxTransformer2DModel's configuration from original keys and shapes."""
    return make_block_config(shapes) | {
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def make_block_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What the shapes of the blocks and the layers around them imply."""

    def count(prefix: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(prefix)})

    width, channels = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": count("double_blocks."),
        "num_single_layers": count("single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def build(config: Mapping[str, Any]) -> Any:
    with without_bitsandbytes():
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    network: Any = FluxTransformer2DModel.from_config(dict(config))
    keep_time_exact(network)
    keep_attention_dtype(network)
    return network


FLUX_TRANSFORMER = Transformer(
    class_name="FluxTransformer2DModel",
    required_keys=("img_in.weight", "double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
    keys=FLUX_KEYS,
    row_split=split_flux_rows,
    spec=spec,
    config=config_from_shapes,
    may_inpaint=True,
)
