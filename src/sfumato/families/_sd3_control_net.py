"""ControlNets of Stable Diffusion 3: copies of its first blocks, called before it with the control image's latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.families._attention_norms import keep_attention_dtype
from sfumato.families._sd3_patches import SD3PatchEmbed
from sfumato.families.base import Family
from sfumato.families.control_net import ControlNetSupport
from sfumato.families.source import select_fields

_FIELDS = (
    *("sample_size", "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim"),
    *("caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size", "qk_norm"),
)
_NEW_LAYERS = 12  # blocks of a new one, as diffusers makes it, where the denoiser has as many as published ones
_BLOCK = "transformer_blocks.{n}"


def _make_config(denoiser: Mapping[str, Any], halvings: int) -> dict[str, Any]:
    """Half as many blocks as the denoiser's at most: of more, the last would be added to its last block, which is
    without effect."""
    layers = min(_NEW_LAYERS, denoiser["num_layers"] // 2)
    return {
        **select_fields(denoiser, _FIELDS),
        "num_layers": layers,
        "dual_attention_layers": [n for n in denoiser.get("dual_attention_layers", ()) if n < layers],
        "extra_conditioning_channels": 0,
        "force_zeros_for_pooled_projection": False,
    }


def _guess_config(denoiser: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    names = {name.split(".")[1]: name for name in shapes if name.startswith("transformer_blocks.")}
    projection = shapes.get("pos_embed_input.proj.weight")
    inside = 0 if projection is None else projection[1] - denoiser["in_channels"]
    return {"num_layers": len(names), "extra_conditioning_channels": inside}


def build_sd3_control_net(config: Mapping[str, Any]) -> Any:
    """With the table of positions on the meta device, like the denoiser's."""
    with without_bitsandbytes():
        from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel

    size = config["pos_embed_max_size"]
    network: Any = SD3ControlNetModel.from_config({**config, "pos_embed_max_size": 1})
    network.register_to_config(pos_embed_max_size=size)
    if network.pos_embed is not None:
        network.pos_embed = SD3PatchEmbed(network.pos_embed.proj, size=size)
    keep_attention_dtype(network)
    return network


def _run(model: Family, part: str, arguments: Mapping[str, Any], image: Tensor) -> dict[str, object]:
    """Where the ControlNet was trained without the pooled text, its control latents are not shifted either."""
    network = model.parts[part].module
    config: Any = network.config
    hidden, pooled, spec = arguments["hidden_states"], arguments["pooled_projections"], model.latents
    if config.force_zeros_for_pooled_projection:
        pooled = torch.zeros_like(pooled)
        assert isinstance(spec.shift, float)
        assert isinstance(spec.scale, float)
        image = image + spec.shift * spec.scale
    embeds: Any = network.pos_embed
    (samples,) = network(
        hidden_states=hidden if embeds is not None else model.denoiser.get_submodule("pos_embed")(hidden),
        controlnet_cond=image,
        encoder_hidden_states=None if config.joint_attention_dim is None else arguments["encoder_hidden_states"],
        pooled_projections=pooled,
        timestep=arguments["timestep"],
        return_dict=False,
    )
    count = model.parts["denoiser"].network.config["num_layers"]
    # One for each block, so that ControlNets of several depths can be added.
    spread = [samples[int(i / (count / len(samples)))] for i in range(count)]
    return {"block_controlnet_hidden_states": spread}


def _find_fault(config: Mapping[str, Any]) -> str:
    if config.get("extra_conditioning_channels"):
        return "it reads a mask beside the control image, which is not implemented"
    return ""


def _list_unread(config: Mapping[str, Any]) -> list[str]:
    """What the last block makes of the text."""
    last = f"transformer_blocks.{config['num_layers'] - 1}"
    return [f"{last}.ff_context.{{*}}", f"{last}.attn.to_add_out.{{*}}"]


_ONE_TABLE = "a ControlNet has a table of positions of its own, in the middle of which it reads"
SD3_CONTROL_NET = ControlNetSupport(
    class_name="SD3ControlNetModel",
    build=build_sd3_control_net,
    make_config=_make_config,
    guess_config=_guess_config,
    declared_defaults={"force_zeros_for_pooled_projection": True, "dual_attention_layers": ()},
    blocks=(_BLOCK,),
    drawn=(),
    run=_run,
    takes_latents=lambda config: True,
    list_unread=_list_unread,
    constant_tensors=("pos_embed.pos_embed",),
    find_fault=_find_fault,
    unsupported_options={"pos_emb_random_crop_rate": _ONE_TABLE, "enable_scaled_pos_embed": _ONE_TABLE},
)
