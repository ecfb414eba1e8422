"""Lumina-Image 2.0's transformer: key map, configuration, adapter targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sfumato.common.layer_kinds import FEED_FORWARD, KEYS, QUERIES
from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.errors import UserError
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import DENOISER_NAMES, DENOISER_PREFIX, Network, PartSpec
from sfumato.families.source import Source, drop_private_fields
from sfumato.families.weights import Weights
from sfumato.formats.controlled import ControlledLayer, LayerPattern, list_transformer_layers
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map

_STACKS = ("layers", "noise_refiner", "context_refiner")  # the last without modulation
PATCH = 2
_MULTIPLE = 256  # the MLP's width is four times the model's, rounded up to a multiple of this


def _make_block_rules(stack: str) -> list[KeyRule]:
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
    qkv = KeyRule(at + "attention.qkv", tuple(f"{at}attn.to_{x}" for x in "qkv"))
    return [qkv, *(KeyRule(at + original, (at + ours,)) for original, ours in names.items())]


_RULES = (
    KeyRule("x_embedder", ("x_embedder",)),
    KeyRule("cap_embedder.{n}", ("time_caption_embed.caption_embedder.{n}",)),
    KeyRule("t_embedder.mlp.0", ("time_caption_embed.timestep_embedder.linear_1",)),
    KeyRule("t_embedder.mlp.2", ("time_caption_embed.timestep_embedder.linear_2",)),
    KeyRule("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
    KeyRule("final_layer.linear", ("norm_out.linear_2",)),
    *chain.from_iterable(_make_block_rules(stack) for stack in _STACKS),
)
LUMINA_KEYS = KeyMap(_RULES, drop=("norm_final.{*}",))  # a norm in published files that is not used
_NORMS = ("attn.norm_q", "attn.norm_k", "norm1", "norm1.norm", "norm2", "ffn_norm1", "ffn_norm2")
_NORM_TARGETS = tuple(f"{stack}.{{n}}.{name}" for stack in _STACKS for name in _NORMS)
_EMBEDDERS = (  # x, t, cap
    "x_embedder",
    "time_caption_embed.timestep_embedder.{*}",
    "time_caption_embed.caption_embedder.1",
)
_RANK_KINDS = {  # where they overlap, the first one that is given decides
    "attn_dim": "{*}.attention.{*}",
    "mlp_dim": "{*}.feed_forward.{*}",
    "mod_dim": "{*}.adaLN_modulation.{*}",
    "refiner_dim": "noise_refiner.{*}|context_refiner.{*}",
}
_BLOCK_CHOICES = {
    "transformer": "layers.{*}|final_layer.{*}",
    "refiners": "noise_refiner.{*}|context_refiner.{*}",
    "noise_refiner": "noise_refiner.{*}",
    "context_refiner": "context_refiner.{*}",
}


def _make_patterns(stack: str, *, follows_text: bool) -> list[LayerPattern]:
    paths = {
        QUERIES: ("attn.to_q",),
        KEYS: ("attn.to_k", "attn.to_v"),
        FEED_FORWARD: ("feed_forward.linear_1", "feed_forward.linear_3"),  # both read the block's input
    }
    return [
        LayerPattern(
            layer_kind=kind, paths="|".join(f"{stack}.{{n}}.{name}" for name in names), follows_text=follows_text
        )
        for kind, names in paths.items()
    ]


_CONTROLLED = (*_make_patterns("noise_refiner", follows_text=False), *_make_patterns("layers", follows_text=True))


def list_lumina_layers(blueprint: Blueprint) -> Mapping[str, ControlledLayer]:
    """Those that see the image."""
    return list_transformer_layers(
        blueprint.networks["denoiser"].weights.read_shapes(), _CONTROLLED, blueprint.latents.token_side
    )


def spec(prefix: str) -> PartSpec:
    return PartSpec(
        name="denoiser",
        key_map=LUMINA_KEYS,
        key_prefix=prefix,
        adapter_map=LUMINA_KEYS,
        adapter_prefix="lora_unet",
        adapter_names=DENOISER_NAMES,
        targets=(*(f"{stack}.{{n}}.{{*}}" for stack in _STACKS), "norm_out.{*}"),
        extra_targets={"embedder_dims": _EMBEDDERS},
        norm_targets=_NORM_TARGETS,
        rank_kinds=_RANK_KINDS,
        block_choices={"train_blocks": _BLOCK_CHOICES},
        block_indices={"train_block_indices": "layers.{n}.{*}"},
        blocks=tuple(f"{stack}.{{n}}" for stack in _STACKS),
        row_split=split_lumina_rows,
    )


def split_lumina_rows(original: str, shape: Sequence[int]) -> list[int]:
    """Rows of q, k, v in a stacked weight: q has the model's width, k and v share the rest.

    With 0 columns for a number that is not known: q has three times the heads of k, as in the published model.
    """
    stacked, width = shape[0], shape[1] or shape[0] - shape[0] // 5 * 2
    return [width, *[(stacked - width) // 2] * 2]


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Lumina2Transformer2DModel's configuration from original keys and shapes."""

    def count(stack: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(stack + ".")})

    width, patch = shapes["x_embedder.weight"]
    (head,) = shapes["layers.0.attention.q_norm.weight"]
    _, shared, _ = split_lumina_rows("", shapes["layers.0.attention.qkv.weight"])
    refiners = {count(stack) for stack in _STACKS[1:]}
    if len(refiners) > 1:
        raise UserError(
            "the checkpoint has different numbers of noise and context refiners", code="refiner-counts-differ"
        )
    return {
        "in_channels": patch // PATCH**2,
        "hidden_size": width,
        "num_layers": count("layers"),
        "num_refiner_layers": refiners.pop(),
        "num_attention_heads": width // head,
        "num_kv_heads": shared // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dim_rope": [head // 3] * 3,
        **_make_feed_forward_config(width, shapes["layers.0.feed_forward.w1.weight"][0]),
    }


def _make_feed_forward_config(width: int, inner: int) -> dict[str, Any]:
    """The arguments from which the network computes `inner`: the published ones, or a pair that gives it exactly."""
    if inner == -(-4 * width // _MULTIPLE) * _MULTIPLE:
        return {"multiple_of": _MULTIPLE, "ffn_dim_multiplier": None}
    return {"multiple_of": 1, "ffn_dim_multiplier": (inner + 0.5) / (4 * width)}  # it rounds down


def read_lumina_transformer(source: Source) -> Network:
    """From a folder, or a file in original names."""
    if source.is_folder:
        config = drop_private_fields(source.read_config("transformer"))
        weights = Weights(file=source.open_weights("transformer"), key_map=make_identity_map())
        return Network(spec=spec(""), config=config, weights=weights)
    prefix = source.find_prefix(DENOISER_PREFIX)
    weights = Weights(file=source.file, key_map=LUMINA_KEYS, prefix=prefix, row_split=split_lumina_rows)
    return Network(spec=spec(prefix), config=config_from_shapes(source.strip_prefix(prefix)), weights=weights)


def build(config: Mapping[str, Any]) -> Any:
    with without_bitsandbytes():
        from diffusers.models.transformers.transformer_lumina2 import Lumina2Transformer2DModel

    network: Any = Lumina2Transformer2DModel.from_config(dict(config))
    network.rope_embedder.register_forward_pre_hook(prepare_positions)
    return network


def prepare_positions(module: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keep diffusers' position embedding, of latents and the caption's mask, from waiting for the device.

    Its tables stay on the device. It reads the mask for the captions' lengths: one caption alone has no padding, so
    that a mask on the CPU says the same; of several, it has to wait.
    """
    latents, mask = args
    if module.freqs_cis[0].device != latents.device:
        module.freqs_cis = [table.to(latents.device, non_blocking=True) for table in module.freqs_cis]
    waits = len(mask) == 1 and mask.device.type != "cpu"
    return latents, torch.ones(mask.shape, dtype=torch.bool) if waits else mask
