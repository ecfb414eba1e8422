"""Stable Diffusion XL: CLIP-L and OpenCLIP's ViT-bigG, a UNet that is told the picture's sizes, too."""

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

CLIP_L = "conditioner.embedders.0.transformer."
CLIP_G = "conditioner.embedders.1.model."
CLIP_G_KEYS = _open_clip.key_map(projected=True)
PIPELINE = _unet.pipeline(
    "StableDiffusionXLPipeline",
    {
        "clip_l": Component(folder="text_encoder", key_map=_clip.key_map()),
        "clip_g": Component(folder="text_encoder_2"),
    },
    tokenizers=("tokenizer", "tokenizer_2"),
    absent=("feature_extractor", "image_encoder"),
    options={"force_zeros_for_empty_prompt": True},
)
STAGES = _unet.Stages(  # 23: embeddings, nine blocks down, three in the middle, nine up, the output
    patterns=(
        "time_embed.{*}|label_emb.{*}",
        *(f"input_blocks.{i}.{{*}}" for i in range(9)),
        *(f"middle_block.{i}.{{*}}" for i in range(3)),
        *(f"output_blocks.{i}.{{*}}" for i in range(9)),
        "out.{*}",
    ),
    sections={"down_lr_weight": range(1, 10), "mid_lr_weight": range(10, 13), "up_lr_weight": range(13, 22)},
)
PUBLISHED = {  # what the names of the UNet's blocks depend on; all models of the line share it
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
LAYER = 2  # from the end: both encoders are read before their last layer, without the final norm
SIZES = 6  # numbers that the UNet is told: height and width, top and left, height and width


def unet_spec(key_map: KeyMap) -> PartSpec:
    """Adapter files keep the original names; those that other programs write in diffusers' names are read, too."""
    return _unet.spec(key_map, key_map, STAGES, aliases=(identity(),))


def clip_l_spec() -> PartSpec:
    return PartSpec(
        name="clip_l",
        key_map=_clip.key_map(),
        key_prefix=CLIP_L,
        adapter_map=_clip.key_map(),
        adapter_prefix="lora_te1",
        targets=_clip.TARGETS,
        blocks=_clip.BLOCKS,
    )


def clip_g_spec() -> PartSpec:
    return PartSpec(
        name="clip_g",
        key_map=CLIP_G_KEYS,
        key_prefix=CLIP_G,
        adapter_map=identity(),
        adapter_prefix="lora_te2",
        targets=_open_clip.TARGETS,
        blocks=_open_clip.BLOCKS,
    )


@FAMILIES.register("sdxl")
class StableDiffusionXL(Family):
    name = "sdxl"
    text_parts = ("clip_l", "clip_g")
    bucket_step = 32
    options = frozenset(
        {"vae", "no_half_vae", "max_token_length", "v_parameterization", "zero_terminal_snr"}
        | {"weighted_captions", "prompt_weighting", "sample_sampler"}
        | _unet.LOSS_OPTIONS
    )
    sampling = Sampling(width=512, height=512, steps=30, scale=7.5, guidance=None, size_multiple=8)
    components = PIPELINE.networks

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module, model: ModelOptions) -> None:
        super().__init__(blueprint, parts, vae)
        self.chunks = _clip.chunks_of(model)
        first, second = _clip.tokenizer_folders(blueprint.source, model, ("tokenizer", "tokenizer_2"))
        self.tokenizers: dict[str, Any] = {
            "clip_l": _tokenizers.clip_tokenizer(first),
            "clip_g": _tokenizers.clip_tokenizer(second, pad_with_zero=True),
        }
        for name, tokenizer in self.tokenizers.items():
            _clip.check_vocabulary(tokenizer, self.parts[name].module)

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            return source.has("text_encoder_2") and (
                source.has("unet") and source.config("unet").get("addition_embed_type") == "text_time"
            )
        return CLIP_G + "ln_final.weight" in source.shapes and any(key.startswith(CLIP_L) for key in source.shapes)

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        if model.v2:
            raise UserError(f"{source.name} is Stable Diffusion XL", fix="leave --v2 out")
        fixed = {"scaling_factor": 0.13025}
        vae = _vae.replacement(model.vae, fixed) if model.vae else _vae.network(source, _vae.PREFIX, fixed)
        clip_g = _read_clip_g(source)
        denoiser = _unet.network(source, unet_spec, lambda config: _size_conditioning(config, clip_g))
        _unet.check_channels(source, denoiser, vae)
        objective, notes = _unet.objective(source, model, noise)
        return Blueprint(
            source=source,
            title="Stable Diffusion XL" + (", predicting v" if objective.predicts == "v" else ""),
            base_model_version="sdxl_base_v1-0",
            architecture="stable-diffusion-xl-v1-base",
            text_parts=cls.text_parts,
            checkpoint=("denoiser", "clip_l", "clip_g", "vae"),
            pipeline=PIPELINE,
            networks={"denoiser": denoiser, "clip_l": _read_clip_l(source), "clip_g": clip_g, "vae": vae},
            objective=objective,
            latents=_vae.latent_spec(vae.config, patch=1, size_multiple=32),
            notes=notes,
        )

    @classmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        builders = {
            "denoiser": _unet.build,
            "clip_l": _clip.build,
            "clip_g": _open_clip.build_projected,
        }
        parts = blueprint.load(builders, dtype=dtype, device=device)
        vae_dtype = _vae.precision(dtype, whole=model.no_half_vae)
        vae = blueprint.networks["vae"].load(_vae.build, dtype=vae_dtype, device=device)
        return cls(blueprint, parts, vae, model)

    def tokenizers_in_order(self) -> Sequence[Any]:
        return (self.tokenizers["clip_l"], self.tokenizers["clip_g"])

    @classmethod
    def adapted(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        denoiser = unet_spec(_unet.key_map(PUBLISHED))
        return {"denoiser": denoiser, "clip_l": clip_l_spec(), "clip_g": clip_g_spec()}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder: Any = self.parts[part].module
        tokenizer = self.tokenizers[part]
        ids = _clip.token_ids(tokenizer, captions, encoder.device, chunks=self.chunks)
        if part == "clip_l":
            hidden, _ = _clip.states(encoder, ids, layer=LAYER)
            return [{"hidden": one} for one in _clip.join_chunks(hidden, self.chunks)]
        hidden, pooled = _open_clip.hidden_and_pooled(encoder, ids, tokenizer.eos_token_id, layer=LAYER)
        joined, first = _clip.join_chunks(hidden, self.chunks), pooled[:: self.chunks]
        return [{"hidden": one, "pooled": vector} for one, vector in zip(joined, first, strict=True)]

    def weigh(self, part: str, features: Tensors, pieces: Pieces) -> Tensors:
        weights = _clip.token_weights(self.tokenizers[part], pieces, chunks=self.chunks)
        return {**features, "hidden": _clip.weighted(features["hidden"], weights)}

    def room(self, part: str, captions: Sequence[str]) -> Room:
        return Room(_tokenizers.lengths(self.tokenizers[part], captions), _clip.CHUNK * self.chunks)

    def text_fingerprint(self, part: str) -> str:
        return _clip.fingerprint(self.tokenizers[part], layer=LAYER, chunks=self.chunks)

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        text = torch.cat([features["clip_l"]["hidden"], features["clip_g"]["hidden"]], dim=-1)
        told = torch.cat([sizes.original, sizes.crop, sizes.target], dim=1)
        return {
            "encoder_hidden_states": text,
            "text_embeds": features["clip_g"]["pooled"],
            "time_ids": told.to(text.device, torch.float32),  # bfloat16 could not tell 1021 from 1024
        }

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae.encode(self.vae, self.latents, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return _vae.decode(self.vae, self.latents, latents)

    def inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        weight = next(self.denoiser.parameters())
        added = {"text_embeds": conditioning["text_embeds"].to(weight.dtype), "time_ids": conditioning["time_ids"]}
        return {
            "sample": noisy.to(weight.dtype),
            "timestep": t.to(noisy.device),
            "encoder_hidden_states": conditioning["encoder_hidden_states"].to(weight.dtype),
            "added_cond_kwargs": added,
        }

    def output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return raw


def _size_conditioning(config: Mapping[str, Any], clip_g: Network) -> dict[str, Any]:
    """The vector is the pooled text followed by a sinusoidal embedding of each size; its width tells theirs."""
    rest = config["projection_class_embeddings_input_dim"] - clip_g.config["projection_dim"]
    return {"addition_time_embed_dim": rest // SIZES, **_unet.heads_of_64(config)}


def _read_clip_l(source: Source) -> Network:
    if source.is_folder:
        config = _clip.config_of_folder(source.config("text_encoder"))
        weights = Weights(file=source.weights("text_encoder"), key_map=_clip.FILE_KEYS)
    else:
        weights = Weights(file=source.file, key_map=_clip.FILE_KEYS, prefix=CLIP_L)
        config = _clip.config_from_shapes(weights.shapes()) | source.config("text_encoder")
    return Network(spec=clip_l_spec(), config=config, weights=weights)


def _read_clip_g(source: Source) -> Network:
    if source.is_folder:
        config = _clip.config_of_folder(source.config("text_encoder_2"))
        weights = Weights(file=source.weights("text_encoder_2"), key_map=_open_clip.PROJECTED_FILE_KEYS)
    else:
        weights = Weights(file=source.file, key_map=CLIP_G_KEYS, prefix=CLIP_G)
        config = _open_clip.config_from_shapes(weights.shapes()) | source.config("text_encoder_2")
    return Network(spec=clip_g_spec(), config=config, weights=weights)
