"""FLUX.1's transformer: key map, configuration, and where adapters go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.families.base import PartSpec
from sfumato.formats.keymap import KeyMap, Rule

DOUBLE, SINGLE = "transformer_blocks.{n}.", "single_transformer_blocks.{n}."
RULES = (
    Rule("img_in", ("x_embedder",)),
    Rule("txt_in", ("context_embedder",)),
    Rule("final_layer.linear", ("proj_out",)),
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), "swap"),
    *(
        Rule(f"{original}.{layer}", (f"time_text_embed.{ours}.linear_{number}",))
        for original, ours in (
            ("time_in", "timestep_embedder"),
            ("vector_in", "text_embedder"),
            ("guidance_in", "guidance_embedder"),
        )
        for layer, number in (("in_layer", 1), ("out_layer", 2))
    ),
    Rule("double_blocks.{n}.img_attn.qkv", tuple(f"{DOUBLE}attn.to_{x}" for x in "qkv")),
    Rule("double_blocks.{n}.txt_attn.qkv", tuple(f"{DOUBLE}attn.add_{x}_proj" for x in "qkv")),
    Rule("double_blocks.{n}.img_attn.norm.query_norm.scale", (f"{DOUBLE}attn.norm_q.weight",)),
    Rule("double_blocks.{n}.img_attn.norm.key_norm.scale", (f"{DOUBLE}attn.norm_k.weight",)),
    Rule("double_blocks.{n}.txt_attn.norm.query_norm.scale", (f"{DOUBLE}attn.norm_added_q.weight",)),
    Rule("double_blocks.{n}.txt_attn.norm.key_norm.scale", (f"{DOUBLE}attn.norm_added_k.weight",)),
    Rule("double_blocks.{n}.img_attn.proj", (f"{DOUBLE}attn.to_out.0",)),
    Rule("double_blocks.{n}.txt_attn.proj", (f"{DOUBLE}attn.to_add_out",)),
    Rule("double_blocks.{n}.img_mlp.0", (f"{DOUBLE}ff.net.0.proj",)),
    Rule("double_blocks.{n}.img_mlp.2", (f"{DOUBLE}ff.net.2",)),
    Rule("double_blocks.{n}.txt_mlp.0", (f"{DOUBLE}ff_context.net.0.proj",)),
    Rule("double_blocks.{n}.txt_mlp.2", (f"{DOUBLE}ff_context.net.2",)),
    Rule("double_blocks.{n}.img_mod.lin", (f"{DOUBLE}norm1.linear",)),
    Rule("double_blocks.{n}.txt_mod.lin", (f"{DOUBLE}norm1_context.linear",)),
    Rule("single_blocks.{n}.linear1", (*(f"{SINGLE}attn.to_{x}" for x in "qkv"), f"{SINGLE}proj_mlp")),
    Rule("single_blocks.{n}.linear2", (f"{SINGLE}proj_out",)),
    Rule("single_blocks.{n}.norm.query_norm.scale", (f"{SINGLE}attn.norm_q.weight",)),
    Rule("single_blocks.{n}.norm.key_norm.scale", (f"{SINGLE}attn.norm_k.weight",)),
    Rule("single_blocks.{n}.modulation.lin", (f"{SINGLE}norm.linear",)),
)
KEYS = KeyMap(RULES)
IN_TARGETS = (  # img, time, vector, guidance, txt
    "x_embedder",
    "time_text_embed.timestep_embedder.{*}",
    "time_text_embed.text_embedder.{*}",
    "time_text_embed.guidance_embedder.{*}",
    "context_embedder",
)
KINDS = {
    **{
        f"{x}_{kind}_dim": f"double_blocks.{{n}}.{x}_{kind}.{{*}}"
        for kind in ("attn", "mlp", "mod")
        for x in ("img", "txt")
    },
    "single_dim": "single_blocks.{n}.linear{n}",
    "single_mod_dim": "single_blocks.{n}.modulation.{*}",
}


def spec(prefix: str) -> PartSpec:
    return PartSpec(
        name="denoiser",
        key_map=KEYS,
        key_prefix=prefix,
        adapter_map=KEYS,
        adapter_prefix="lora_unet",
        targets=(DOUBLE + "{*}", SINGLE + "{*}"),
        extra_targets={"in_dims": IN_TARGETS},
        kinds=KINDS,
        choices={"train_blocks": {"double": "double_blocks.{*}", "single": "single_blocks.{*}"}},
        counted={
            "train_double_block_indices": "double_blocks.{n}.{*}",
            "train_single_block_indices": "single_blocks.{n}.{*}",
        },
        blocks=(DOUBLE[:-1], SINGLE[:-1]),
    )


def rows(original: str, shape: Sequence[int]) -> list[int]:
    """How a stacked weight falls apart, from its shape alone: q, k, v of the width, the rest is the MLP's."""
    if original.endswith("linear1.weight"):
        width = shape[1]
        return [width, width, width, shape[0] - 3 * width]
    if original.endswith("linear1.bias"):  # the MLP is four times as wide as the model
        return [shape[0] // 7] * 3 + [shape[0] - 3 * (shape[0] // 7)]
    return [shape[0] // 3] * 3


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """FluxTransformer2DModel's configuration; any number of blocks, guidance where its embedder is there."""

    def count(kind: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(kind)})

    width, channels = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return {
        "in_channels": channels,
        "num_layers": count("double_blocks."),
        "num_single_layers": count("single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def config_of_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def build(config: Mapping[str, Any]) -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel.from_config(dict(config))
