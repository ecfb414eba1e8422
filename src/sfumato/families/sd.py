"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet over 4-channel latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import Pieces
from sfumato.errors import UserError
from sfumato.families import _clip, _open_clip, _tokenizers, _unet, _vae
from sfumato.families.base import FAMILIES, Blueprint, Component, Family, Network, Part, PartSpec, Room, Sampling
from sfumato.families.source import Source, Weights
from sfumato.formats.keymap import KeyMap, identity

UNET = _unet.PREFIX
CLIP = "cond_stage_model.transformer."  # 1.x: OpenAI's CLIP-L
OPEN_CLIP = "cond_stage_model.model."  # 2.x: OpenCLIP's ViT-H
OPEN_CLIP_LAYERS = 24  # of which the model was trained without the last
PIPELINE = _unet.pipeline(
    "StableDiffusionPipeline",
    {"clip": Component(folder="text_encoder", key_map=_clip.key_map())},
    tokenizers=("tokenizer",),
    absent=("safety_checker", "feature_extractor", "image_encoder"),
    options={"requires_safety_checker": False},
)
STAGES = _unet.Stages(  # 25: twelve blocks down, the middle as one, twelve up
    patterns=(
        *(f"input_blocks.{i}.{{*}}" for i in range(12)),
        "middle_block.{*}",
        *(f"output_blocks.{i}.{{*}}" for i in range(12)),
    ),
    sections={"down_lr_weight": range(12), "mid_lr_weight": range(12, 13), "up_lr_weight": range(13, 25)},
)


def unet_spec(key_map: KeyMap) -> PartSpec:
    return _unet.spec(key_map, identity(), STAGES)  # adapter files of this family keep diffusers' names


def clip_spec(key_map: KeyMap, prefix: str) -> PartSpec:
    return PartSpec(
        name="clip",
        key_map=key_map,
        key_prefix=prefix,
        adapter_map=_clip.key_map(),
        adapter_prefix="lora_te",
        targets=_clip.TARGETS,
        blocks=_clip.BLOCKS,
    )


@FAMILIES.register("sd")
class StableDiffusion(Family):
    name = "sd"
    text_parts = ("clip",)
    bucket_step = 64
    options = frozenset(
        {"vae", "no_half_vae", "clip_skip", "max_token_length", "v2", "v_parameterization", "zero_terminal_snr"}
        | {"weighted_captions", "prompt_weighting", "sample_sampler"}
        | _unet.LOSS_OPTIONS
    )
    sampling = Sampling(width=512, height=512, steps=30, scale=7.5, guidance=None, size_multiple=8)
    components = PIPELINE.networks

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module, model: ModelOptions) -> None:
        super().__init__(blueprint, parts, vae)
        self.clip_layer = model.clip_skip or 1
        self.chunks = _clip.chunks_of(model)
        source = blueprint.source
        folder = _clip.tokenizer_folders(source, model, ("tokenizer",))[0]
        told = {} if source.is_folder else source.config("tokenizer")
        pad_with_zero = is_version_2(source)
        self.tokenizer: Any = _tokenizers.clip_tokenizer(folder, pad_with_zero=pad_with_zero, merges=told.get("merges"))
        _clip.check_vocabulary(self.tokenizer, self.parts["clip"].module)

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            return source.has("unet") and not source.config("unet").get("addition_embed_type")
        text = any(key.startswith((CLIP, OPEN_CLIP)) for key in source.shapes)
        return UNET + "input_blocks.0.0.weight" in source.shapes and text

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        second = is_version_2(source)
        if model.v2 and not second:
            raise UserError(f"{source.name} is Stable Diffusion 1.x", fix="leave --v2 out")
        fixed = {"scaling_factor": 0.18215}
        vae = _vae.replacement(model.vae, fixed) if model.vae else _vae.network(source, _vae.PREFIX, fixed)
        denoiser = _unet.network(source, unet_spec, _unet.heads_of_64 if second else _eight_heads)
        _unet.check_channels(source, denoiser, vae)
        objective, notes = _unet.objective(source, model, noise)
        v = objective.predicts == "v"
        return Blueprint(
            source=source,
            title=f"Stable Diffusion {2 if second else 1}.x" + (", predicting v" if v else ""),
            base_model_version=f"sd_v{2 if second else 1}" + ("_v" if v else ""),
            architecture=f"stable-diffusion-v2-{'768-v' if v else '512'}" if second else "stable-diffusion-v1",
            text_parts=cls.text_parts,
            checkpoint=("denoiser", "clip", "vae"),
            pipeline=PIPELINE,
            networks={"denoiser": denoiser, "clip": _read_clip(source), "vae": vae},
            objective=objective,
            latents=_vae.latent_spec(vae.config, patch=1, size_multiple=64),
            metadata={"ss_v2": second},
            notes=notes,
        )

    @classmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        builders = {"denoiser": _unet.build, "clip": _clip.build}
        parts = blueprint.load(builders, dtype=dtype, device=device)
        vae_dtype = _vae.precision(dtype, whole=model.no_half_vae)
        vae = blueprint.networks["vae"].load(_vae.build, dtype=vae_dtype, device=device)
        return cls(blueprint, parts, vae, model)

    def tokenizers_in_order(self) -> Sequence[Any]:
        return (self.tokenizer,)

    @classmethod
    def adapted(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        return {"denoiser": unet_spec(identity()), "clip": clip_spec(_clip.key_map(), CLIP)}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder: Any = self.parts[part].module
        ids = _clip.token_ids(self.tokenizer, captions, encoder.device, chunks=self.chunks)
        hidden = _clip.hidden_states(encoder, ids, layer=self.clip_layer)
        return [{"hidden": one} for one in _clip.join_chunks(hidden, self.chunks)]

    def weigh(self, part: str, features: Tensors, pieces: Pieces) -> Tensors:
        weights = _clip.token_weights(self.tokenizer, pieces, chunks=self.chunks)
        return {**features, "hidden": _clip.weighted(features["hidden"], weights)}

    def room(self, part: str, captions: Sequence[str]) -> Room:
        return Room(_tokenizers.lengths(self.tokenizer, captions), _clip.CHUNK * self.chunks)

    def text_fingerprint(self, part: str) -> str:
        return _clip.fingerprint(self.tokenizer, layer=self.clip_layer, chunks=self.chunks)

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        return {"encoder_hidden_states": features["clip"]["hidden"]}

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae.encode(self.vae, self.latents, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return _vae.decode(self.vae, self.latents, latents)

    def inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        weight = next(self.denoiser.parameters())
        text = conditioning["encoder_hidden_states"].to(weight.dtype)
        return {"sample": noisy.to(weight.dtype), "timestep": t.to(noisy.device), "encoder_hidden_states": text}

    def output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return raw


def is_version_2(source: Source) -> bool:
    """2.x reads OpenCLIP's text; in a folder, where encoders share their names, the activation tells."""
    if not source.is_folder:
        return any(key.startswith(OPEN_CLIP) for key in source.shapes)
    return source.config("text_encoder").get("hidden_act") == "gelu"


def _eight_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_head_dim": 8}  # diffusers' name for the number of heads


def _read_clip(source: Source) -> Network:
    if source.is_folder:
        config = _clip.config_of_folder(source.config("text_encoder"))
        weights = Weights(file=source.weights("text_encoder"), key_map=_clip.FILE_KEYS)
        second = is_version_2(source)
        key_map = _open_clip.key_map(projected=False) if second else _clip.key_map()
        return Network(spec=clip_spec(key_map, OPEN_CLIP if second else CLIP), config=config, weights=weights)
    if is_version_2(source):
        key_map = _open_clip.key_map(projected=False, unused=_unused_layer(source))
        weights = Weights(file=source.file, key_map=key_map, prefix=OPEN_CLIP)
        config = _open_clip.config_from_shapes(weights.shapes()) | source.config("text_encoder")
        return Network(spec=clip_spec(key_map, OPEN_CLIP), config=config, weights=weights)
    weights = Weights(file=source.file, key_map=_clip.FILE_KEYS, prefix=CLIP)
    config = _clip.config_from_shapes(weights.shapes()) | source.config("text_encoder")
    return Network(spec=clip_spec(_clip.key_map(), CLIP), config=config, weights=weights)


def _unused_layer(source: Source) -> int | None:
    """The last layer, which the model was trained without; a file made from a folder may lack it already."""
    layers = _open_clip.layer_count(list(source.shapes), OPEN_CLIP)
    return None if layers == OPEN_CLIP_LAYERS - 1 else layers - 1
