"""The UNet of Stable Diffusion: key map, configuration, and what a checkpoint predicts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import INPAINT, Images
from sfumato.diffusion.objective import VariancePreserving
from sfumato.errors import UserError
from sfumato.families._file_kinds import CHANNELS_FAULT, check_input_channels, check_network_size
from sfumato.families.blueprint import Component, Pipeline
from sfumato.families.foreign_keys import V_MARK, ZERO_SNR_MARK
from sfumato.families.part import DENOISER_NAMES, DENOISER_PREFIX, Network, PartSpec
from sfumato.families.source import Source, read_json
from sfumato.families.weights import Weights
from sfumato.formats.keymap import KeyMap, KeyRule, make_identity_map

_LEVELS = ("down_blocks.{n}", "mid_block", "up_blocks.{n}")
_TRANSFORMER_LAYERS = (
    *("proj_in", "proj_out"),
    *(f"transformer_blocks.{{n}}.attn1.to_{name}" for name in ("q", "k", "v", "out.0")),
    *(f"transformer_blocks.{{n}}.attn2.to_{name}" for name in ("q", "k", "v", "out.0")),
    *(f"transformer_blocks.{{n}}.ff.net.{name}" for name in ("0.proj", "2")),
)
TARGETS = tuple(f"{block}.attentions.{{n}}.{layer}" for block, layer in product(_LEVELS, _TRANSFORMER_LAYERS))
_RESNET_LAYERS = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")  # and linear layers between them
CONV_TARGETS = (
    *(f"{block}.resnets.{{n}}.{layer}" for block, layer in product(_LEVELS, _RESNET_LAYERS)),
    "down_blocks.{n}.downsamplers.{n}.conv",
    "up_blocks.{n}.upsamplers.{n}.conv",
)
NORM_TARGETS = (
    *(f"{block}.attentions.{{n}}.norm" for block in _LEVELS),
    *(f"{block}.attentions.{{n}}.transformer_blocks.{{n}}.norm{i}" for block in _LEVELS for i in (1, 2, 3)),
    *(f"{block}.resnets.{{n}}.norm{i}" for block in _LEVELS for i in (1, 2)),
    "conv_norm_out",
)
_OTHER_TARGETS = (  # LyCORIS adapts them; without {n}, since a name with _ for dots is read by the words of targets
    *("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
    *("add_embedding.linear_1", "add_embedding.linear_2"),
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
PREDICTION_TYPES: dict[Any, Literal["epsilon", "v"]] = {"v": "v", "v_prediction": "v", "epsilon": "epsilon"}
_VARIANTS = {1: "depth", 3: "upscaling", 4: "image editing"}  # by the number of further channels
SIZE_EMBEDDER = "label_emb.0.0.weight"  # its key, without the prefix of the denoiser's
_HEAD_CHANNELS = 64  # channels of an attention head from Stable Diffusion 2 on
_RESNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER_LAYERS = {
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
    rules = [KeyRule(original, (ours,)) for original, ours in _OUTER_LAYERS.items()]
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    index = 1
    for level, block_type in enumerate(config["down_block_types"]):
        attention = "CrossAttn" in block_type
        for layer in range(layers):
            rules += _make_block_rules(f"input_blocks.{index}", f"down_blocks.{level}", layer, attention=attention)
            index += 1
        if level < levels - 1:
            rules.append(KeyRule(f"input_blocks.{index}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",)))
            index += 1
    rules += _make_resnet_rules("middle_block.0", "mid_block.resnets.0")
    rules += _make_resnet_rules("middle_block.2", "mid_block.resnets.1")
    rules.append(KeyRule("middle_block.1.{*}", ("mid_block.attentions.0.{*}",)))
    for level, block_type in enumerate(config["up_block_types"]):
        attention = "CrossAttn" in block_type
        for layer in range(layers + 1):
            block = level * (layers + 1) + layer
            rules += _make_block_rules(f"output_blocks.{block}", f"up_blocks.{level}", layer, attention=attention)
            if layer == layers and level < levels - 1:
                upsampler = f"output_blocks.{block}.{2 if attention else 1}.conv"
                rules.append(KeyRule(upsampler, (f"up_blocks.{level}.upsamplers.0.conv",)))
    return KeyMap(rules)


def guess_key_map(published: Mapping[str, Any], names: Iterable[str]) -> KeyMap:
    """The key map of the model that an adapter file is for. names: of its layers.

    published: the configuration of the published models, which have two layers per level; their input block 3 is a
    downsampler, which has no attention.
    """
    single = any("input_blocks_3_1_" in name.replace(".", "_") for name in names)
    return key_map({**published, "layers_per_block": 1} if single else published)


def _make_block_rules(original: str, ours: str, layer: int, *, attention: bool) -> list[KeyRule]:
    rules = _make_resnet_rules(f"{original}.0", f"{ours}.resnets.{layer}")
    if attention:
        rules.append(KeyRule(f"{original}.1.{{*}}", (f"{ours}.attentions.{layer}.{{*}}",)))
    return rules


def _make_resnet_rules(original: str, ours: str) -> list[KeyRule]:
    return [KeyRule(f"{original}.{theirs}", (f"{ours}.{name}",)) for theirs, name in _RESNET_NAMES.items()]


@dataclass(frozen=True, kw_only=True)
class LrBlocks:
    """How sd-scripts numbers a UNet's blocks for learning rates: PartSpec.lr_blocks and lr_block_ranges."""

    patterns: tuple[str, ...]
    ranges: Mapping[str, range]


def spec(file_map: KeyMap, adapter_map: KeyMap, lr_blocks: LrBlocks) -> PartSpec:
    return PartSpec(
        name="denoiser",
        key_map=file_map,
        key_prefix=DENOISER_PREFIX,
        adapter_map=adapter_map,
        adapter_prefix="lora_unet",
        adapter_names=DENOISER_NAMES,
        targets=TARGETS,
        conv_targets=CONV_TARGETS,
        other_targets=_OTHER_TARGETS,
        norm_targets=NORM_TARGETS,
        lr_blocks=lr_blocks.patterns,
        lr_block_ranges=lr_blocks.ranges,
        blocks=BLOCKS,
    )


def read_unet(
    source: Source, spec: Callable[[KeyMap], PartSpec], complete: Callable[[dict[str, Any]], dict[str, Any]]
) -> Network:
    """The denoiser of a file or folder. complete: adds to the configuration what the shapes of a file do not say."""
    if source.is_folder:
        config = source.read_config("unet")
        return Network(
            spec=spec(key_map(config)),
            config=config,
            weights=Weights(file=source.open_weights("unet"), key_map=make_identity_map()),
        )
    config = config_from_shapes(source.strip_prefix(DENOISER_PREFIX))
    config = config | complete(config) | source.read_config("unet")
    names = key_map(config)
    weights = Weights(file=source.file, key_map=names, prefix=DENOISER_PREFIX)
    return Network(spec=spec(names), config=config, weights=weights)


def count_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """The number of heads of each level, which diffusers calls attention_head_dim."""
    return {"attention_head_dim": [max(1, channels // _HEAD_CHANNELS) for channels in config["block_out_channels"]]}


def make_pipeline(name: str, text: Mapping[str, Component], *, tokenizers: tuple[str, ...], **more: Any) -> Pipeline:
    """The layout of models with a UNet. text: the text encoders' folders."""
    return Pipeline(
        name=name,
        networks={"denoiser": Component(folder="unet"), "vae": Component(folder="vae"), **text},
        scheduler="DDIMScheduler",
        scheduler_options={"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        tokenizers=tokenizers,
        **more,
    )


def choose_pipeline(pipeline: Pipeline, *, inpaints: bool) -> Pipeline:
    """That of text to image, or diffusers' other one for a model for inpainting."""
    return replace(pipeline, name=pipeline.name.replace("Pipeline", "InpaintPipeline")) if inpaints else pipeline


def make_v2_error(source: Source, version: str) -> UserError:
    """The error for --v2 with a checkpoint of another version."""
    return UserError(f"--v2: {source.name} is {version}", code="v2-version-mismatch", fix="remove --v2")


def check_channels(source: Source, denoiser: Network, vae: Network) -> bool:
    """Whether the denoiser is one for inpainting: latents, a mask and the masked image's latents.

    Raises UserError for variants with other input channels (depth) and for another model's VAE.
    """
    channels, latent = denoiser.config["in_channels"], vae.config["latent_channels"]
    if vae.option and channels == denoiser.config["out_channels"]:
        check_network_size(vae.option, vae.weights.file.header.path, CHANNELS_FAULT, latent, channels)
    if channels == 2 * latent + 1:
        return True
    variant = _VARIANTS.get(channels - latent, "another kind of input")
    check_input_channels(source.name, channels, latent, variant)
    return False


def add_inpaint_channels(arguments: dict[str, object], images: Images) -> dict[str, object]:
    """The mask and the masked image's latents follow the noisy latents' channels."""
    sample, inpaint = arguments["sample"], images[INPAINT].latents
    assert isinstance(sample, Tensor)
    assert inpaint is not None
    return {**arguments, "sample": torch.cat([sample, inpaint.to(sample)], dim=1)}


class ObjectiveFacts(NamedTuple):
    """The objective of the options and the checkpoint, and what there is to say of it."""

    objective: VariancePreserving
    notes: tuple[str, ...]  # where the options and the checkpoint disagree
    declared: tuple[str, ...]  # what the checkpoint declares and no option repeats


def read_objective(source: Source, model: ModelOptions, noise: NoiseOptions) -> ObjectiveFacts:
    """What an option says, else what the checkpoint declares, else noise prediction and the plain schedule."""
    check_no_edm(source)
    notes: list[str] = []
    declared: list[str] = []
    use_v, zero_snr = model.v_parameterization, noise.zero_terminal_snr
    prediction, declares_zero_snr = read_prediction_type(source), read_zero_terminal_snr(source)
    if prediction is not None and use_v != (prediction == "v"):
        if "v_parameterization" in model.model_fields_set:
            option, other = ("", "noise") if use_v else ("no_", "v")
            notes.append(
                f"--{option}v_parameterization: {source.name} declares {other} prediction; it is trained to predict "
                + ("v" if use_v else "noise")
            )
        else:
            use_v = True
            declared.append(f"{source.name} declares v prediction, which is used (--no_v_parameterization: noise)")
    if declares_zero_snr is not None and zero_snr != declares_zero_snr:
        if "zero_terminal_snr" in noise.model_fields_set:
            notes.append(
                f"--{'' if zero_snr else 'no_'}zero_terminal_snr: {source.name} declares "
                + ("zero terminal SNR" if declares_zero_snr else "a schedule without zero terminal SNR")
            )
        else:
            zero_snr = True
            declared.append(f"{source.name} declares zero terminal SNR, which is used (--no_zero_terminal_snr: not)")
    if zero_snr and not use_v:
        notes.append("--zero_terminal_snr: a model that predicts noise learns nothing from pure noise, unlike with v")
    objective = VariancePreserving(predicts="v" if use_v else "epsilon", zero_terminal_snr=zero_snr)
    return ObjectiveFacts(objective, tuple(notes), tuple(declared))


def check_no_edm(source: Source) -> None:
    """Raise UserError for a checkpoint whose inputs and outputs are scaled by EDM's rules, e.g. Playground v2.5."""
    in_file = any(key.startswith("edm_") for key in source.shapes)
    scheduler = _read_scheduler(source).get("_class_name", "") if source.is_folder else ""
    if in_file or scheduler.startswith("EDM"):
        raise UserError(
            f"{source.name} was trained by EDM's rules (as Playground v2.5 and CosXL were), not to predict noise or v",
            code="edm-checkpoint-unsupported",
            fix="start from a checkpoint that predicts noise or v",
        )


def read_prediction_type(source: Source) -> Literal["epsilon", "v"] | None:
    """What a checkpoint declares: in a folder's scheduler, by a file's marker tensor or in its metadata."""
    if source.is_folder:
        return PREDICTION_TYPES.get(_read_scheduler(source).get("prediction_type"))
    metadata = source.file.header.metadata
    if V_MARK in source.shapes or metadata.get("ss_v_parameterization") == "True":
        return "v"
    if metadata.get("modelspec.architecture", "").endswith("-v"):  # stable-diffusion-v2-768-v
        return "v"
    if metadata.get("ss_base_model_version", "").endswith("_v"):
        return "v"
    return PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", "").lower())


def read_zero_terminal_snr(source: Source) -> bool | None:
    """Whether a checkpoint declares zero terminal SNR: in a folder's scheduler, by a file's marker, in its metadata."""
    if source.is_folder:
        return _read_scheduler(source).get("rescale_betas_zero_snr")
    if ZERO_SNR_MARK in source.shapes:
        return True
    known = {"True": True, "False": False}
    return known.get(source.file.header.metadata.get("ss_zero_terminal_snr", ""))


def _read_scheduler(source: Source) -> dict[str, Any]:
    path = source.path / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.is_file() else {}


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """diffusers' UNet2DConditionModel configuration from the shapes of original keys (prefix removed).

    The number of heads is not in the shapes; the family adds it.
    """
    channels, crossed, depths = [], [], []
    count = 1 + max(int(m[1]) for key in shapes if (m := re.match(r"input_blocks\.(\d+)\.", key)))
    starts_level = True
    for index in range(1, count):
        if f"input_blocks.{index}.0.op.weight" in shapes:
            starts_level = True
            continue
        if starts_level:
            channels.append(shapes[f"input_blocks.{index}.0.out_layers.3.weight"][0])
            crossed.append(f"input_blocks.{index}.1.norm.weight" in shapes)
            depths.append(max(1, _count_transformer_blocks(shapes, f"input_blocks.{index}.1.")))
        starts_level = False
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
        **_make_size_conditioning(shapes),
    }


def _make_size_conditioning(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Configuration of the embedding of pooled text and sizes, where the checkpoint has one."""
    if SIZE_EMBEDDER not in shapes:
        return {}
    return {
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": shapes[SIZE_EMBEDDER][1],
    }


def _count_transformer_blocks(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"transformer_blocks\.(\d+)\.")
    return len({match[1] for key in shapes if (match := pattern.match(key))})


def build(config: Mapping[str, Any]) -> Any:
    with without_bitsandbytes():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(config))
