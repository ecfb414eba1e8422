"""ControlNets of FLUX.1: copies of its first blocks, called before it; new ones have the structure of XLabs'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.families._attention_norms import keep_attention_dtype
from sfumato.families._flux_keys import DOUBLE, FLUX_KEYS, SINGLE, split_flux_rows
from sfumato.families._flux_parts import keep_time_exact, pack
from sfumato.families.base import Family
from sfumato.families.control_net import ControlNetSupport, FileLayout, make_image_layer_rules
from sfumato.families.source import select_fields
from sfumato.formats.keymap import KeyMap, KeyRule

_FIELDS = (
    *("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim"),
    *("guidance_embeds", "axes_dims_rope"),
)
_UNGUIDED_BASE = 3.5  # guidance of a ControlNet of dev beside schnell, which has none
_NEW_LAYERS = 2  # blocks of two streams in a new one, as in sd-scripts; none of one stream
_CALLED_WITH = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")
_XLABS_KEYS = KeyMap(
    (
        *FLUX_KEYS.rules,
        *make_image_layer_rules("input_hint_block"),
        KeyRule("pos_embed_input", ("controlnet_x_embedder",)),
        KeyRule("controlnet_blocks.{n}", ("controlnet_blocks.{n}",)),
    )
)


def _make_config(denoiser: Mapping[str, Any], halvings: int) -> dict[str, Any]:
    return {
        **select_fields(denoiser, _FIELDS),
        "num_layers": min(_NEW_LAYERS, denoiser["num_layers"]),
        "num_single_layers": 0,
        "patch_size": 2,
        "conditioning_embedding_channels": denoiser["in_channels"] // 4,
    }


def _guess_config(denoiser: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    def count(blocks: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(blocks)})

    hint = shapes.get("input_hint_block.conv_out.weight")
    modes = shapes.get("controlnet_mode_embedder.weight")
    return {
        "num_layers": count("transformer_blocks."),
        "num_single_layers": count("single_transformer_blocks."),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "patch_size": 1 if hint is None else 2,
        "conditioning_embedding_channels": None if hint is None else hint[0],
        "num_mode": modes and modes[0],
    }


def build_flux_control_net(config: Mapping[str, Any]) -> Any:
    with without_bitsandbytes():
        from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

    network: Any = FluxControlNetModel.from_config(dict(config))
    keep_time_exact(network)
    keep_attention_dtype(network)
    return network


def _takes_latents(config: Mapping[str, Any]) -> bool:
    """Those of XLabs read pixels, those of InstantX latents."""
    return config.get("conditioning_embedding_channels") is None


def _run(model: Family, name: str, arguments: Mapping[str, Any], image: Tensor) -> dict[str, object]:
    """One residual for each block, so that ControlNets of several depths can be added."""
    part, denoiser = model.parts[name], model.parts["denoiser"].network.config
    own = {name: arguments[name] for name in _CALLED_WITH}
    if part.network.config["guidance_embeds"]:
        unguided = torch.full_like(arguments["timestep"], _UNGUIDED_BASE)
        own["guidance"] = arguments.get("guidance", unguided)
    in_latents = _takes_latents(part.network.config)
    image = pack(image) if in_latents else image
    double, single = part.module(**own, controlnet_cond=image, return_dict=False)
    return {
        "controlnet_block_samples": _fill_blocks(double, denoiser["num_layers"], around=not in_latents),
        "controlnet_single_block_samples": _fill_blocks(single, denoiser["num_single_layers"], around=False),
    }


def _fill_blocks(samples: Sequence[Tensor] | None, blocks: int, *, around: bool) -> list[Tensor] | None:
    """A residual for each block: XLabs count them around, InstantX spread them out."""
    if not samples:
        return None
    interval = math.ceil(blocks / len(samples))
    return [samples[i % len(samples) if around else i // interval] for i in range(blocks)]


def _find_fault(config: Mapping[str, Any]) -> str:
    return "it is one of several modes (ControlNet-Union), which is not implemented" if config.get("num_mode") else ""


def _list_unread(config: Mapping[str, Any]) -> list[str]:
    """What the last block of two streams makes of the text, unless blocks of one stream follow."""
    last = f"transformer_blocks.{config['num_layers'] - 1}"
    return [] if config["num_single_layers"] else [f"{last}.ff_context.{{*}}", f"{last}.attn.to_add_out.{{*}}"]


FLUX_CONTROL_NET = ControlNetSupport(
    class_name="FluxControlNetModel",
    build=build_flux_control_net,
    make_config=_make_config,
    guess_config=_guess_config,
    declared_defaults={"conditioning_embedding_channels": None},
    blocks=(DOUBLE[:-1], SINGLE[:-1]),
    drawn=("input_hint_block.conv_in.{*}", "input_hint_block.blocks.{*}", "controlnet_x_embedder.{*}"),
    run=_run,
    list_layouts=lambda config: [FileLayout("", _XLABS_KEYS)],
    takes_latents=_takes_latents,
    list_unread=_list_unread,
    find_fault=_find_fault,
    row_split=split_flux_rows,
    unsupported_options={"apply_t5_attn_mask": "diffusers' ControlNets of FLUX.1 attend to the padding of T5-XXL"},
)
