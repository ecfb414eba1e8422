"""Stable Diffusion 1.x: one CLIP text encoder, a UNet over 4-channel latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.diffusion.objective import VariancePreserving
from sfumato.families import _clip, _tokenizers, _unet, _vae
from sfumato.families._source import Source, Weights
from sfumato.families.base import FAMILIES, Blueprint, Family, Network, Part, PartSpec, Sampling
from sfumato.formats.keymap import KeyMap, identity

UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer."
UNET_TARGETS = ("{*}attentions.{n}.{*}",)
UNET_CONV_TARGETS = ("{*}resnets.{n}.{*}", "{*}downsamplers.{n}.conv", "{*}upsamplers.{n}.conv")
UNET_BLOCKS = (
    "down_blocks.{n}.resnets.{n}",
    "down_blocks.{n}.attentions.{n}",
    "mid_block.resnets.{n}",
    "mid_block.attentions.{n}",
    "up_blocks.{n}.resnets.{n}",
    "up_blocks.{n}.attentions.{n}",
)


def unet_spec(key_map: KeyMap) -> PartSpec:
    return PartSpec(
        name="denoiser",
        key_map=key_map,
        key_prefix=UNET,
        adapter_map=identity(),  # adapter files of this family keep diffusers' names
        adapter_prefix="lora_unet",
        targets=UNET_TARGETS,
        conv_targets=UNET_CONV_TARGETS,
        blocks=UNET_BLOCKS,
    )


def clip_spec() -> PartSpec:
    return PartSpec(
        name="clip",
        key_map=_clip.key_map(),
        key_prefix=CLIP,
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
    sampling = Sampling(width=512, height=512, steps=30, scale=7.5, guidance=None, size_multiple=8)

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module, model: ModelOptions) -> None:
        super().__init__(blueprint, parts, vae)
        self.clip_layer = model.clip_skip or 1
        self.tokenizer: Any = _tokenizers.clip_tokenizer(_tokenizer_folder(blueprint.source, model))
        _clip.check_vocabulary(self.tokenizer, self.parts["clip"].module)

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            return source.has("unet") and not source.config("unet").get("addition_embed_type")
        return UNET + "input_blocks.0.0.weight" in source.shapes and any(key.startswith(CLIP) for key in source.shapes)

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        fixed = {"scaling_factor": 0.18215}
        vae = _vae.replacement(Path(model.vae), fixed) if model.vae else _vae.network(source, _vae.PREFIX, fixed)
        return Blueprint(
            source=source,
            title="Stable Diffusion 1.x",
            base_model_version="sd_v1",
            architecture="stable-diffusion-v1",
            text_parts=cls.text_parts,
            networks={"denoiser": _read_unet(source), "clip": _read_clip(source), "vae": vae},
            objective=VariancePreserving(),
            latents=_vae.latent_spec(vae.config, patch=1, size_multiple=64),
        )

    @classmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        def part(name: str, build: Callable[[Mapping[str, Any]], nn.Module]) -> Part:
            network = blueprint.networks[name]
            return Part(spec=network.spec, module=network.load(build, dtype=dtype, device=device))

        parts = {"denoiser": part("denoiser", _unet.build), "clip": part("clip", _clip.build)}
        vae_dtype = torch.float32 if model.no_half_vae and dtype != torch.float64 else dtype
        vae = blueprint.networks["vae"].load(_vae.build, dtype=vae_dtype, device=device)
        return cls(blueprint, parts, vae, model)

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder: Any = self.parts[part].module
        ids = _clip.token_ids(self.tokenizer, captions, encoder.device)
        return [{"hidden": hidden} for hidden in _clip.hidden_states(encoder, ids, layer=self.clip_layer)]

    def text_fingerprint(self, part: str) -> str:
        return f"layer {self.clip_layer}, {_clip.LENGTH} tokens"

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


def _read_unet(source: Source) -> Network:
    if source.is_folder:
        config = source.config("unet")
        weights = Weights(file=source.weights("unet"), key_map=identity())
        return Network(spec=unet_spec(_unet.key_map(config)), config=config, weights=weights)
    inside = {key[len(UNET) :]: shape for key, shape in source.shapes.items() if key.startswith(UNET)}
    config = _unet.config_from_shapes(inside) | {"attention_head_dim": 8} | source.config("unet")
    key_map = _unet.key_map(config)
    return Network(
        spec=unet_spec(key_map), config=config, weights=Weights(file=source.file, key_map=key_map, prefix=UNET)
    )


def _read_clip(source: Source) -> Network:
    if source.is_folder:
        config = _clip.config_of_folder(source.config("text_encoder"))
        return Network(
            spec=clip_spec(),
            config=config,
            weights=Weights(file=source.weights("text_encoder"), key_map=_clip.FILE_KEYS),
        )
    weights = Weights(file=source.file, key_map=_clip.FILE_KEYS, prefix=CLIP)
    config = _clip.config_from_shapes(weights.shapes()) | source.config("text_encoder")
    return Network(spec=clip_spec(), config=config, weights=weights)


def _tokenizer_folder(source: Source, model: ModelOptions) -> Path | None:
    """--tokenizer, else the folder beside the checkpoint, else None for the vocabulary that ships with the program."""
    if model.tokenizer:
        return Path(model.tokenizer[0])
    beside = (source.path if source.is_folder else source.path.parent) / "tokenizer"
    return beside if beside.is_dir() else None
