"""FLUX.1's transformer: key map, configuration, and where adapters go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.families._flux_parts import Transformer, keep_time_exact
from sfumato.families.base import PartSpec
from sfumato.formats.keymap import KeyMap, Rule

DOUBLE, SINGLE = "transformer_blocks.{n}.", "single_transformer_blocks.{n}."
BLOCK_RULES = (  # and what stands before and after the blocks
    Rule("img_in", ("x_embedder",)),
    Rule("txt_in", ("context_embedder",)),
    Rule("final_layer.linear", ("proj_out",)),
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
    Rule("single_blocks.{n}.linear1", (*(f"{SINGLE}attn.to_{x}" for x in "qkv"), f"{SINGLE}proj_mlp")),
    Rule("single_blocks.{n}.linear2", (f"{SINGLE}proj_out",)),
    Rule("single_blocks.{n}.norm.query_norm.scale", (f"{SINGLE}attn.norm_q.weight",)),
    Rule("single_blocks.{n}.norm.key_norm.scale", (f"{SINGLE}attn.norm_k.weight",)),
)
MODULATION_RULES = (
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
    Rule("double_blocks.{n}.img_mod.lin", (f"{DOUBLE}norm1.linear",)),
    Rule("double_blocks.{n}.txt_mod.lin", (f"{DOUBLE}norm1_context.linear",)),
    Rule("single_blocks.{n}.modulation.lin", (f"{SINGLE}norm.linear",)),
)
KEYS = KeyMap((*BLOCK_RULES, *MODULATION_RULES))
IN_TARGETS = (  # img, time, vector, guidance, txt
    "x_embedder",
    "time_text_embed.timestep_embedder.{*}",
    "time_text_embed.text_embedder.{*}",
    "time_text_embed.guidance_embedder.{*}",
    "context_embedder",
)
BLOCK_KINDS = {
    **{f"{x}_{kind}_dim": f"double_blocks.{{n}}.{x}_{kind}.{{*}}" for kind in ("attn", "mlp") for x in ("img", "txt")},
    "single_dim": "single_blocks.{n}.linear{n}",
}
MODULATION_KINDS = {
    **{f"{x}_mod_dim": f"double_blocks.{{n}}.{x}_mod.{{*}}" for x in ("img", "txt")},
    "single_mod_dim": "single_blocks.{n}.modulation.{*}",
}


def spec(prefix: str) -> PartSpec:
    return part(prefix, KEYS, IN_TARGETS, BLOCK_KINDS | MODULATION_KINDS)


def part(prefix: str, keys: KeyMap, in_targets: tuple[str, ...], kinds: Mapping[str, str]) -> PartSpec:
    """A transformer of two kinds of blocks, adapted inside them."""
    return PartSpec(
        name="denoiser",
        key_map=keys,
        key_prefix=prefix,
        adapter_map=keys,
        adapter_prefix="lora_unet",
        targets=(DOUBLE + "{*}", SINGLE + "{*}"),
        extra_targets={"in_dims": in_targets},
        kinds=kinds,
        choices={"train_blocks": {"double": "double_blocks.{*}", "single": "single_blocks.{*}"}},
        counted={
            "train_double_block_indices": "double_blocks.{n}.{*}",
            "train_single_block_indices": "single_blocks.{n}.{*}",
        },
        blocks=(DOUBLE[:-1], SINGLE[:-1]),
        rows=rows,
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
    return block_config(shapes) | {
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def block_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What the blocks and the layers around them say."""

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
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def build(config: Mapping[str, Any]) -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    network: Any = FluxTransformer2DModel.from_config(dict(config))
    keep_time_exact(network)
    return network


TRANSFORMER = Transformer(
    kind="FluxTransformer2DModel",
    marks=("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
    keys=KEYS,
    rows=rows,
    spec=spec,
    config=config_from_shapes,
)
