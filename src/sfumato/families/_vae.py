"""The KL autoencoder shared by most families: key map, configuration, encoding and decoding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.config import ModelOptions
from sfumato.diffusion.objective import LatentSpec
from sfumato.errors import UserError
from sfumato.families._file_kinds import AUTOENCODER, ShapeTable, option_context, require_kind
from sfumato.families.part import Network, Part, PartSpec
from sfumato.families.source import Source, find_given, find_weight_file, read_json
from sfumato.families.weights import Weights
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map

_RESNET_NAMES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
VAE_PREFIX = "first_stage_model."  # of its keys in checkpoints of Stable Diffusion
VAE_PREFIXES = (VAE_PREFIX, "vae.")  # the second in ComfyUI's files of whole flow models
_TRAINING_KEYS = ("loss.{*}", "model_ema.{*}")  # the discriminator, and averaged weights
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAMES = KeyMap(  # diffusers' earlier names of attention layers, still in published folders; one by one as 1x1 conv
    [
        *(KeyRule(f"{{*}}.{old}", (f"{{*}}.{new}",), "squeeze") for old, new in _OLD_ATTENTION_NAMES.items()),
        *(KeyRule(f"{{*}}.{new}", (f"{{*}}.{new}",), "squeeze") for new in _OLD_ATTENTION_NAMES.values()),
        KeyRule("{*}", ("{*}",)),
    ],
    beside=_TRAINING_KEYS,
)
_ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_FURTHER_ATTENTION_NAMES = _OLD_ATTENTION_NAMES | {name: name for name in _ATTENTION_NAMES.values()}


def key_map(levels: int) -> KeyMap:
    """Original (LDM) names <-> diffusers' AutoencoderKL; decoder levels are numbered in reverse."""
    rules = [KeyRule(name, (name,)) for name in ("quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rules += [KeyRule(f"{side}.{name}", (f"{side}.{name}",)) for name in ("conv_in", "conv_out")]
        rules.append(KeyRule(f"{side}.norm_out", (f"{side}.conv_norm_out",)))
        for block in (1, 2):
            rules += _make_resnet_rules(f"{side}.mid.block_{block}", f"{side}.mid_block.resnets.{block - 1}")
        for theirs, ours in _ATTENTION_NAMES.items():
            op = "squeeze" if theirs != "norm" else ""
            rules.append(KeyRule(f"{side}.mid.attn_1.{theirs}", (f"{side}.mid_block.attentions.0.{ours}",), op))
        for theirs, ours in _FURTHER_ATTENTION_NAMES.items():  # as some converters write them
            op = "" if ours == "group_norm" else "squeeze"
            rules.append(KeyRule(f"{side}.mid.attn_1.{theirs}", (f"{side}.mid_block.attentions.0.{ours}",), op))
    for level in range(levels):
        original = levels - 1 - level
        rules += _make_resnet_rules(f"encoder.down.{level}.block.{{n}}", f"encoder.down_blocks.{level}.resnets.{{n}}")
        rules += _make_resnet_rules(f"decoder.up.{original}.block.{{n}}", f"decoder.up_blocks.{level}.resnets.{{n}}")
        rules.append(
            KeyRule(f"encoder.down.{level}.downsample.conv", (f"encoder.down_blocks.{level}.downsamplers.0.conv",))
        )
        rules.append(KeyRule(f"decoder.up.{original}.upsample.conv", (f"decoder.up_blocks.{level}.upsamplers.0.conv",)))
    return KeyMap(rules, beside=_TRAINING_KEYS)


def _make_resnet_rules(original: str, ours: str) -> list[KeyRule]:
    return [KeyRule(f"{original}.{theirs}", (f"{ours}.{name}",)) for theirs, name in _RESNET_NAMES.items()]


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """AutoencoderKL configuration from the shapes of original keys, without the scaling of the latents."""
    levels = 1 + max(int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.(\d+)\.", key)))
    blocks = {m[1] for key in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key))}
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": len(blocks),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def make_latent_spec(config: Mapping[str, Any], *, patch: int, size_multiple: int) -> LatentSpec:
    return LatentSpec(
        channels=config["latent_channels"],
        downscale=2 ** (len(config["block_out_channels"]) - 1),
        patch=patch,
        scale=config["scaling_factor"],
        shift=config.get("shift_factor") or 0.0,
        size_multiple=size_multiple,
    )


def spec(names: KeyMap) -> PartSpec:
    return PartSpec(
        name="vae", key_map=names, key_prefix=VAE_PREFIX, adapter_map=make_identity_map(), adapter_prefix=""
    )


def find_vae(source: Source, model: ModelOptions, scaling: Mapping[str, Any]) -> Network:
    """The autoencoder that --vae names, else the one in the checkpoint, else what stands for it."""
    if model.vae:
        with option_context("vae"):
            given = find_given(source, "vae", model.vae)
        return read_vae_option(given, scaling)
    has_own = source.has_network("vae") or source.find_prefix(VAE_PREFIX + "encoder.")
    cached = None if has_own else source.find_cached("vae")
    return replace(read_vae(cached, "", scaling), option="vae") if cached else read_vae(source, VAE_PREFIX, scaling)


def read_vae(source: Source, prefix: str, scaling: Mapping[str, Any]) -> Network:
    """The autoencoder of a checkpoint, its keys under `prefix`, or of a diffusers model or its `vae` folder.

    scaling: the entries of the configuration that only the family knows. Raises UserError where there is none.
    """
    if source.is_folder:
        folder = source.path / "vae" if source.has_network("vae") else source.path
        config = {**scaling, **read_json(folder / "config.json")}
        weights = Weights(file=open_checkpoint(find_weight_file(folder)), key_map=OLD_NAMES)
        require_kind(AUTOENCODER, weights.read_shapes(), weights.file.header.tensors, folder)
        return Network(spec=spec(key_map(len(config["block_out_channels"]))), config=config, weights=weights)
    shapes = ShapeTable(source.path, source.strip_prefix(prefix))
    if "encoder.conv_in.weight" not in shapes:
        raise UserError(
            f"{source.path} holds no autoencoder", code="autoencoder-missing", fix="give one with --vae FILE"
        )
    if any(key.startswith("encoder.down_blocks.") for key in shapes):
        return _read_diffusers_file(source, prefix, scaling)
    config = config_from_shapes(shapes) | dict(scaling) | source.read_config("vae")
    names = key_map(len(config["block_out_channels"]))
    return Network(spec=spec(names), config=config, weights=Weights(file=source.file, key_map=names, prefix=prefix))


def _read_diffusers_file(source: Source, prefix: str, scaling: Mapping[str, Any]) -> Network:
    """A single file in diffusers' names, taken out of its folder."""
    weights = Weights(file=source.file, key_map=OLD_NAMES, prefix=prefix)
    shapes = weights.read_shapes()
    names = key_map(len({key.split(".")[2] for key in shapes if key.startswith("encoder.down_blocks.")}))
    config = config_from_shapes(names.rename_shapes(shapes)) | dict(scaling)
    return Network(spec=spec(names), config=config, weights=weights)


def read_vae_option(source: Source, scaling: Mapping[str, Any], *, option: str = "vae") -> Network:
    """The autoencoder in a folder, or in a file with or without the prefix of whole checkpoints.

    Raises UserError where it is no autoencoder, or its configuration is that of another model's.
    """
    with option_context(option):
        path = source.path
        prefix = source.find_prefix(*VAE_PREFIXES)
        if not source.is_folder:
            require_kind(AUTOENCODER, source.strip_prefix(prefix), source.shapes, path)
        network = read_vae(source, prefix, scaling)
        for name, expected in scaling.items():
            if network.config[name] != expected:
                raise UserError(
                    f"{path} is the autoencoder of another model: its {name} is {network.config[name]}, "
                    f"expected {expected}",
                    code="autoencoder-scaling-mismatch",
                    fix=f"give the --{option} that this model was trained with",
                )
    return replace(network, option=option)


def build(config: Mapping[str, Any]) -> Any:
    with without_bitsandbytes():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))


def choose_dtype(dtype: torch.dtype, *, no_half: bool = False) -> torch.dtype:
    """The model's dtype, but float32 instead of float16, which overflows in published autoencoders.

    no_half: float32 instead of bfloat16, too.
    """
    return torch.float32 if dtype == torch.float16 or (no_half and dtype == torch.bfloat16) else dtype


def encode(vae: Part, latents: LatentSpec, pixels: Tensor, noise: Tensor, *, tile: int = 0) -> Tensor:
    """Posterior sample mean + std * noise, then (z - shift) * scale: (B, 3, H, W) -> (B, C, h, w).

    tile: side in pixels of overlapping tiles that are processed one after the other, in less memory; 0: whole images.
    """
    network: Any = vae.module
    set_tiles(network, latents, tile)
    posterior = network.encode(pixels.to(vae.device, vae.dtype, non_blocking=True)).latent_dist
    z = posterior.mean + posterior.std * noise.to(posterior.mean, non_blocking=True)
    return (z - latents.shift) * latents.scale


def decode(vae: Part, latents: LatentSpec, z: Tensor, *, tile: int = 0) -> Tensor:
    """Scaled latents (B, C, h, w) -> (B, 3, H, W). tile: as of `encode`."""
    network: Any = vae.module
    set_tiles(network, latents, tile)
    return network.decode((z / latents.scale + latents.shift).to(vae.device, vae.dtype), return_dict=False)[0]


def set_tiles(network: Any, latents: LatentSpec, tile: int) -> None:
    """Turn diffusers' tiling of an AutoencoderKL on or off. tile: side in pixels; 0: off."""
    network.use_tiling = tile > 0
    if tile:
        network.tile_latent_min_size = max(1, tile // latents.downscale)
        network.tile_sample_min_size = network.tile_latent_min_size * latents.downscale
