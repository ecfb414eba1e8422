"""The KL autoencoder shared by most families: key map, configuration, encoding and decoding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.objective import LatentSpec
from sfumato.errors import UserError
from sfumato.families._file_kinds import AUTOENCODER, Found, require, told_of
from sfumato.families.base import Network, PartSpec
from sfumato.families.source import Source, Weights, find_path, read_json, weight_file
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.keymap import KeyMap, Rule, identity

RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
PREFIX = "first_stage_model."  # inside whole checkpoints
OLD_NAMES = KeyMap(  # diffusers' own first names for the attention layers, still in published folders
    [
        Rule("{*}.query", ("{*}.to_q",)),
        Rule("{*}.key", ("{*}.to_k",)),
        Rule("{*}.value", ("{*}.to_v",)),
        Rule("{*}.proj_attn", ("{*}.to_out.0",)),
        Rule("{*}", ("{*}",)),
    ]
)
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def key_map(levels: int) -> KeyMap:
    """Original (LDM) names <-> diffusers' AutoencoderKL; decoder levels count the other way round."""
    rules = [
        Rule(f"{side}.{end}", (f"{side}.{end}",)) for side in ("encoder", "decoder") for end in ("conv_in", "conv_out")
    ]
    rules += [Rule(f"{side}.norm_out", (f"{side}.conv_norm_out",)) for side in ("encoder", "decoder")]
    rules += [Rule(name, (name,)) for name in ("quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        for block in (1, 2):
            rules += _resnet(f"{side}.mid.block_{block}", f"{side}.mid_block.resnets.{block - 1}")
        for theirs, ours in ATTENTION.items():
            op = "squeeze" if theirs != "norm" else ""
            rules.append(Rule(f"{side}.mid.attn_1.{theirs}", (f"{side}.mid_block.attentions.0.{ours}",), op))
    for level in range(levels):
        original = levels - 1 - level
        rules += _resnet(f"encoder.down.{level}.block.{{n}}", f"encoder.down_blocks.{level}.resnets.{{n}}")
        rules += _resnet(f"decoder.up.{original}.block.{{n}}", f"decoder.up_blocks.{level}.resnets.{{n}}")
        rules.append(
            Rule(f"encoder.down.{level}.downsample.conv", (f"encoder.down_blocks.{level}.downsamplers.0.conv",))
        )
        rules.append(Rule(f"decoder.up.{original}.upsample.conv", (f"decoder.up_blocks.{level}.upsamplers.0.conv",)))
    return KeyMap(rules)


def _resnet(original: str, ours: str) -> list[Rule]:
    return [Rule(f"{original}.{theirs}", (f"{ours}.{name}",)) for theirs, name in RESNET.items()]


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """AutoencoderKL configuration from the shapes of original keys; scaling is the family's."""
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


def latent_spec(config: Mapping[str, Any], *, patch: int, size_multiple: int) -> LatentSpec:
    return LatentSpec(
        channels=config["latent_channels"],
        downscale=2 ** (len(config["block_out_channels"]) - 1),
        patch=patch,
        scale=config["scaling_factor"],
        shift=config.get("shift_factor") or 0.0,
        size_multiple=size_multiple,
    )


def spec(map_: KeyMap) -> PartSpec:
    return PartSpec(name="vae", key_map=map_, key_prefix=PREFIX, adapter_map=identity(), adapter_prefix="")


def network(source: Source, prefix: str, fixed: Mapping[str, Any]) -> Network:
    """The autoencoder inside a checkpoint: original names under `prefix`, or the `vae` folder of a diffusers model."""
    if source.is_folder:
        folder = source.path / "vae" if source.has("vae") else source.path
        config = {**fixed, **read_json(folder / "config.json")}
        weights = Weights(file=open_checkpoint(weight_file(folder)), key_map=OLD_NAMES)
        require(AUTOENCODER, weights.shapes(), weights.file.header.tensors, folder)
        return Network(spec=spec(key_map(len(config["block_out_channels"]))), config=config, weights=weights)
    inside = {key[len(prefix) :]: shape for key, shape in source.shapes.items() if key.startswith(prefix)}
    if "encoder.conv_in.weight" not in inside:
        raise UserError(f"{source.path} holds no autoencoder", fix="give one with --vae FILE")
    inside = Found(source.path, inside)
    if any(key.startswith("encoder.down_blocks.") for key in inside):
        return _with_our_names(source, inside, prefix, fixed)
    config = config_from_shapes(inside) | dict(fixed) | source.config("vae")
    map_ = key_map(len(config["block_out_channels"]))
    return Network(spec=spec(map_), config=config, weights=Weights(file=source.file, key_map=map_, prefix=prefix))


def _with_our_names(
    source: Source, inside: Mapping[str, Sequence[int]], prefix: str, fixed: Mapping[str, Any]
) -> Network:
    """A single file in diffusers' names, taken out of its folder."""
    weights = Weights(file=source.file, key_map=OLD_NAMES, prefix=prefix)
    shapes = weights.shapes()
    map_ = key_map(len({key.split(".")[2] for key in shapes if key.startswith("encoder.down_blocks.")}))
    config = config_from_shapes({map_.locate(name).original: shape for name, shape in shapes.items()}) | dict(fixed)
    return Network(spec=spec(map_), config=config, weights=weights)


def replacement(given: str | Path, fixed: Mapping[str, Any], *, option: str = "vae") -> Network:
    """What the option names: a folder, or a file with or without the prefix that whole checkpoints use.

    Raises UserError where it is no autoencoder, or says of itself that it is another model's.
    """
    with told_of(option):
        source = Source(find_path(str(given)))
        path = source.path
        prefix = PREFIX if any(key.startswith(PREFIX) for key in source.shapes) else ""
        if not source.is_folder:
            inside = [key[len(prefix) :] for key in source.shapes if key.startswith(prefix)]
            require(AUTOENCODER, inside, source.shapes, path)
        found = network(source, prefix, fixed)
        for name, usual in fixed.items():
            if found.config[name] != usual:
                raise UserError(
                    f"{path} is the autoencoder of another model: its {name} is {found.config[name]}, "
                    f"that of this model {usual}",
                    fix=f"give the --{option} that this model was trained with",
                )
    return replace(found, option=option)


def build(config: Mapping[str, Any]) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))


def precision(dtype: torch.dtype, *, whole: bool = False) -> torch.dtype:
    """The model's dtype, except that float16 overflows inside published autoencoders; `whole`: no half at all."""
    return torch.float32 if dtype == torch.float16 or (whole and dtype == torch.bfloat16) else dtype


def encode(vae: Any, latents: LatentSpec, pixels: Tensor, noise: Tensor) -> Tensor:
    """Posterior sample mean + std * noise, then (z - shift) * scale: (B, 3, H, W) -> (B, C, h, w)."""
    weight = next(vae.parameters())
    posterior = vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist
    z = posterior.mean + posterior.std * noise.to(posterior.mean)
    return (z - latents.shift) * latents.scale


def decode(vae: Any, latents: LatentSpec, z: Tensor) -> Tensor:
    weight = next(vae.parameters())
    return vae.decode((z / latents.scale + latents.shift).to(weight.dtype), return_dict=False)[0]
