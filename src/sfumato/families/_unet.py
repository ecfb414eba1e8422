"""The UNet of Stable Diffusion: its configuration and key map, read off a checkpoint, and what it predicts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.diffusion.objective import VariancePreserving
from sfumato.errors import UserError
from sfumato.families._file_kinds import LATENT, check_width
from sfumato.families.base import Component, Network, PartSpec, Pipeline
from sfumato.families.source import Source, Weights, read_json
from sfumato.formats.keymap import KeyMap, Rule, identity

PREFIX = "model.diffusion_model."  # inside whole checkpoints
PLACES = ("down_blocks.{n}", "mid_block", "up_blocks.{n}")
LAYERS = (  # of a transformer
    *("proj_in", "proj_out"),
    *(f"transformer_blocks.{{n}}.attn{i}.to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out.0")),
    *(f"transformer_blocks.{{n}}.ff.net.{name}" for name in ("0.proj", "2")),
)
TARGETS = tuple(f"{place}.attentions.{{n}}.{layer}" for place in PLACES for layer in LAYERS)
CONVOLUTIONS = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")  # and what else stands between them
CONV_TARGETS = (
    *(f"{place}.resnets.{{n}}.{layer}" for place in PLACES for layer in CONVOLUTIONS),
    "down_blocks.{n}.downsamplers.{n}.conv",
    "up_blocks.{n}.upsamplers.{n}.conv",
)
BLOCKS = (
    "down_blocks.{n}.resnets.{n}",
    "down_blocks.{n}.attentions.{n}",
    "mid_block.resnets.{n}",
    "mid_block.attentions.{n}",
    "up_blocks.{n}.resnets.{n}",
    "up_blocks.{n}.attentions.{n}",
)
LOSS_OPTIONS = {"debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"}  # no flow has them
HEAD = 64  # channels of an attention head from Stable Diffusion 2 on
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def key_map(config: Mapping[str, Any]) -> KeyMap:
    """Original (LDM) names <-> diffusers names of the UNet with this diffusers configuration."""
    rules = [Rule(original, (ours,)) for original, ours in ENDS.items()]
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    index = 1
    for level, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            rules += _block(f"input_blocks.{index}", f"down_blocks.{level}", layer, attention="CrossAttn" in kind)
            index += 1
        if level < levels - 1:
            rules.append(Rule(f"input_blocks.{index}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",)))
            index += 1
    rules += _resnet("middle_block.0", "mid_block.resnets.0") + _resnet("middle_block.2", "mid_block.resnets.1")
    rules.append(Rule("middle_block.1.{*}", ("mid_block.attentions.0.{*}",)))
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            block = level * (layers + 1) + layer
            attention = "CrossAttn" in kind
            rules += _block(f"output_blocks.{block}", f"up_blocks.{level}", layer, attention=attention)
            if layer == layers and level < levels - 1:
                place = f"output_blocks.{block}.{2 if attention else 1}.conv"
                rules.append(Rule(place, (f"up_blocks.{level}.upsamplers.0.conv",)))
    return KeyMap(rules)


def _block(original: str, ours: str, layer: int, *, attention: bool) -> list[Rule]:
    rules = _resnet(f"{original}.0", f"{ours}.resnets.{layer}")
    if attention:
        rules.append(Rule(f"{original}.1.{{*}}", (f"{ours}.attentions.{layer}.{{*}}",)))
    return rules


def _resnet(original: str, ours: str) -> list[Rule]:
    return [Rule(f"{original}.{theirs}", (f"{ours}.{name}",)) for theirs, name in RESNET.items()]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """How the field counts a UNet's blocks: ordered patterns on original keys, and which of them an argument counts."""

    patterns: tuple[str, ...]
    sections: Mapping[str, range]


def spec(map_: KeyMap, adapter_map: KeyMap, stages: Stages, aliases: tuple[KeyMap, ...] = ()) -> PartSpec:
    return PartSpec(
        name="denoiser",
        key_map=map_,
        key_prefix=PREFIX,
        adapter_map=adapter_map,
        adapter_aliases=aliases,
        adapter_prefix="lora_unet",
        targets=TARGETS,
        conv_targets=CONV_TARGETS,
        stages=stages.patterns,
        sections=stages.sections,
        blocks=BLOCKS,
    )


def network(
    source: Source, spec: Callable[[KeyMap], PartSpec], complete: Callable[[dict[str, Any]], dict[str, Any]]
) -> Network:
    """The denoiser of a checkpoint or a folder; `complete` adds what the shapes in a single file do not say."""
    if source.is_folder:
        config = source.config("unet")
        return Network(
            spec=spec(key_map(config)), config=config, weights=Weights(file=source.weights("unet"), key_map=identity())
        )
    inside = {key[len(PREFIX) :]: shape for key, shape in source.shapes.items() if key.startswith(PREFIX)}
    config = config_from_shapes(inside)
    config = config | complete(config) | source.config("unet")
    map_ = key_map(config)
    return Network(spec=spec(map_), config=config, weights=Weights(file=source.file, key_map=map_, prefix=PREFIX))


def heads_of_64(config: Mapping[str, Any]) -> dict[str, Any]:
    """How many heads each level has; diffusers calls that attention_head_dim."""
    return {"attention_head_dim": [max(1, channels // HEAD) for channels in config["block_out_channels"]]}


def pipeline(name: str, text: Mapping[str, Component], *, tokenizers: tuple[str, ...], **more: Any) -> Pipeline:
    """The folder layout that diffusers has for models of this line; `text`: the text encoders' folders."""
    return Pipeline(
        name=name,
        networks={"denoiser": Component(folder="unet"), "vae": Component(folder="vae"), **text},
        scheduler="DDIMScheduler",
        scheduler_options={"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        tokenizers=tokenizers,
        **more,
    )


def check_channels(source: Source, denoiser: Network, vae: Network) -> None:
    """Inpainting and similar variants see more than the noisy picture, which nothing here would give them."""
    sees, latent = denoiser.config["in_channels"], vae.config["latent_channels"]
    if vae.option and sees == denoiser.config["out_channels"]:
        check_width(vae.option, vae.weights.file.header.path, LATENT, latent, sees)
    if sees != latent:
        raise UserError(
            f"{source.name} is a variant whose denoiser takes {sees} channels instead of {latent} (inpainting, depth "
            "or the like), which is not supported",
            fix="start from the plain text-to-image checkpoint",
        )


def objective(source: Source, model: ModelOptions, noise: NoiseOptions) -> tuple[VariancePreserving, tuple[str, ...]]:
    """What the options say that is predicted and how it is noised, and notes where that does not fit.

    Raises UserError where the checkpoint says v and --v_parameterization is missing: training on noise would ruin it.
    """
    told, asked_v, notes = told_prediction(source), model.v_parameterization, []
    if told == "v" and not asked_v:
        raise UserError(f"{source.name} says that it predicts v", fix="--v_parameterization")
    if told == "epsilon" and asked_v:
        notes.append(f"--v_parameterization: {source.name} says that it predicts noise; it is trained to predict v")
    if noise.zero_terminal_snr and not asked_v:
        notes.append("--zero_terminal_snr: a model that predicts noise learns nothing from pure noise; v would")
    if told_zero_terminal_snr(source) and not noise.zero_terminal_snr:
        notes.append(f"{source.name} says that its noise schedule ends in pure noise, --zero_terminal_snr is not given")
    made = VariancePreserving(predicts="v" if asked_v else "epsilon", zero_terminal_snr=noise.zero_terminal_snr)
    return made, tuple(notes)


def told_prediction(source: Source) -> Literal["epsilon", "v"] | None:
    """What a checkpoint says of itself: a folder's scheduler, a file's model spec or its marker tensor."""
    if source.is_folder:
        named = _scheduler(source).get("prediction_type")
    else:
        named = "v" if "v_pred" in source.shapes else source.file.header.metadata.get("modelspec.prediction_type")
    known: dict[Any, Literal["epsilon", "v"]] = {"v": "v", "v_prediction": "v", "epsilon": "epsilon"}
    return known.get(named)


def told_zero_terminal_snr(source: Source) -> bool:
    """Whether a checkpoint says that its schedule ends in pure noise: a folder's scheduler, a file's marker tensor."""
    if source.is_folder:
        return bool(_scheduler(source).get("rescale_betas_zero_snr"))
    return "ztsnr" in source.shapes


def _scheduler(source: Source) -> dict[str, Any]:
    path = source.path / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.is_file() else {}


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """diffusers' UNet2DConditionModel configuration from the shapes of original keys (prefix removed).

    Number of heads and norm groups leave no trace in shapes; the family fills them in.
    """
    channels, crossed, depths = [], [], []
    count = 1 + max(int(m[1]) for key in shapes if (m := re.match(r"input_blocks\.(\d+)\.", key)))
    here: list[int] = []
    for index in range(1, count):
        if f"input_blocks.{index}.0.op.weight" in shapes:
            here = []
            continue
        if not here:
            channels.append(shapes[f"input_blocks.{index}.0.out_layers.3.weight"][0])
            crossed.append(f"input_blocks.{index}.1.norm.weight" in shapes)
            depths.append(max(1, _depth(shapes, f"input_blocks.{index}.1.")))
        here.append(index)
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in crossed]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(crossed)]
    to_k = next(shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight"))
    projection = next(shape for key, shape in shapes.items() if key.endswith(".1.proj_in.weight"))
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": (count - len(channels)) // len(channels),
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": to_k[1],
        "use_linear_projection": len(projection) == 2,
        "transformer_layers_per_block": depths,
        **_size_conditioning(shapes),
    }


def _size_conditioning(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The vector of pooled text and sizes, where the checkpoint has a layer for it."""
    if "label_emb.0.0.weight" not in shapes:
        return {}
    return {
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
    }


def _depth(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    found = {m[1] for key in shapes if (m := re.match(re.escape(prefix) + r"transformer_blocks\.(\d+)\.", key))}
    return len(found)


def build(config: Mapping[str, Any]) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(config))
