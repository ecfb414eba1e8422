"""What a control image steers in UNets: ControlNets, copies of their lower half, and the layers that LLLite changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sfumato.common.layer_kinds import CROSS_QUERIES, FEED_FORWARD, KEYS, QUERIES
from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.families import _unet
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.control_net import ControlNetSupport, FileLayout, make_image_layer_rules
from sfumato.families.source import select_fields
from sfumato.formats.controlled import ControlledLayer
from sfumato.formats.keymap import KeyMap, KeyRule

_FIELDS = (  # that both classes of diffusers have
    *("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type", "only_cross_attention"),
    *("block_out_channels", "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn"),
    *("norm_num_groups", "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "encoder_hid_dim"),
    *("encoder_hid_dim_type", "attention_head_dim", "num_attention_heads", "use_linear_projection", "class_embed_type"),
    *("addition_embed_type", "addition_time_embed_dim", "num_class_embeds", "upcast_attention"),
    *("resnet_time_scale_shift", "projection_class_embeddings_input_dim"),
)
_LAYERS = re.compile(
    r"(?:down_blocks\.(\d+)|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\."
    r"(attn1\.to_[qkv]|attn2\.to_q|ff\.net\.0\.proj)\.weight"
)
_LAYER_KINDS = {
    "attn1.to_q": QUERIES,
    "attn1.to_k": KEYS,
    "attn1.to_v": KEYS,
    "attn2.to_q": CROSS_QUERIES,
    "ff.net.0.proj": FEED_FORWARD,
}
_LLLITE_PREFIX = "lllite_unet_"
_IMAGE_PATH = "controlnet_cond_embedding"  # what brings the control image to the latents' size
_WIDTHS = "conditioning_embedding_out_channels"  # its channels, before each halving and after the last one
_IMAGE_WIDTHS = (16, 32, 96, 256)
_CALLED_WITH = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs")


def _make_config(denoiser: Mapping[str, Any], halvings: int) -> dict[str, Any]:
    widths = (*_IMAGE_WIDTHS, *_IMAGE_WIDTHS[-1:] * halvings)[: halvings + 1]
    return {**select_fields(denoiser, _FIELDS), _WIDTHS: widths}


def _guess_config(denoiser: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The channels before each halving and after the last one, as far as the file has them."""
    names = [f"{_IMAGE_PATH}.conv_in.weight"]
    while f"{_IMAGE_PATH}.blocks.{2 * len(names) - 1}.weight" in shapes:
        names.append(f"{_IMAGE_PATH}.blocks.{2 * len(names) - 1}.weight")
    return {_WIDTHS: tuple(shapes[name][0] for name in names)} if names[0] in shapes else {}


def _count_halvings(config: Mapping[str, Any]) -> int:
    return len(config.get(_WIDTHS, _IMAGE_WIDTHS)) - 1


def build_unet_control_net(config: Mapping[str, Any]) -> Any:
    with without_bitsandbytes():
        from diffusers.models.controlnets.controlnet import ControlNetModel

    return ControlNetModel.from_config(dict(config))


def _list_layouts(denoiser: Mapping[str, Any]) -> list[FileLayout]:
    """The original names, as in a whole file and alone."""
    rules = [*_unet.key_map(denoiser).rules, *make_image_layer_rules(_IMAGE_PATH)]
    rules.append(KeyRule("zero_convs.{n}.0", ("controlnet_down_blocks.{n}",)))
    rules.append(KeyRule("middle_block_out.0", ("controlnet_mid_block",)))
    names = KeyMap(rules)
    return [FileLayout("control_model.", names), FileLayout("", names)]


def _run(model: Family, part: str, arguments: Mapping[str, Any], image: Tensor) -> dict[str, object]:
    """The image goes from [-1, 1] to [0, 1], as every program that generates images with ControlNets has it."""
    own = {name: arguments[name] for name in _CALLED_WITH if name in arguments}
    network = model.parts[part].module
    down, middle = network(**own, controlnet_cond=(image + 1) / 2, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


UNET_CONTROL_NET = ControlNetSupport(
    class_name="ControlNetModel",
    build=build_unet_control_net,
    make_config=_make_config,
    blocks=_unet.BLOCKS,
    guess_config=_guess_config,
    count_halvings=_count_halvings,
    drawn=(f"{_IMAGE_PATH}.conv_in.{{*}}", f"{_IMAGE_PATH}.blocks.{{*}}"),
    run=_run,
    list_layouts=_list_layouts,
)


def list_unet_layers(blueprint: Blueprint) -> Mapping[str, ControlledLayer]:
    """Name in LLLite files, from the original one, -> layer: queries of both attentions, keys and values of the first,
    and for the second version the feed-forward's first layer. Those of the upper half are left as they are.
    """
    denoiser = blueprint.networks["denoiser"]
    shapes = denoiser.weights.read_shapes()
    layers: dict[str, ControlledLayer] = {}
    deepest = len(denoiser.config["block_out_channels"]) - 1
    for weight in shapes:
        match = _LAYERS.fullmatch(weight)
        if match is None:
            continue
        path = weight.removesuffix(".weight")
        original = denoiser.spec.key_map.locate(path).original
        level = deepest if match[1] is None else int(match[1])
        name = _LLLITE_PREFIX + original.replace(".", "_")
        layers[name] = ControlledLayer(
            name=name,
            path=path,
            inputs=shapes[weight][1],
            token_side=blueprint.latents.token_side * 2**level,
            layer_kind=_LAYER_KINDS[match[2]],
            in_version_1=match[2].startswith("attn"),
        )
    return layers
