"""FLUX.1 dev and schnell: CLIP-L for the pooled vector, T5-XXL for the words, a transformer over packed latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import Pieces
from sfumato.families import _clip, _flux_keys, _flux_parts, _t5, _tokenizers, _vae
from sfumato.families._file_kinds import WIDTH, check_width, told_of
from sfumato.families._flux_parts import component, image_ids, pack, unpack, whole_mask
from sfumato.families.base import FAMILIES, Blueprint, Component, Family, Network, Part, PartSpec, Room, Sampling
from sfumato.families.source import Source, Weights

T5_LENGTH = {True: 512, False: 256}  # with embedded guidance (dev), without (schnell)
DEFAULT_GUIDANCE = 3.5
COMPONENTS = {
    "denoiser": Component(folder="transformer"),
    "clip_l": Component(folder="text_encoder", key_map=_clip.key_map()),
    "t5": Component(folder="text_encoder_2", takes_lora=False),
}


def clip_spec() -> PartSpec:
    return PartSpec(
        name="clip_l",
        key_map=_clip.key_map(),
        key_prefix="",
        adapter_map=_clip.key_map(),
        adapter_prefix="lora_te1",
        targets=_clip.TARGETS,
        blocks=_clip.BLOCKS,
    )


@FAMILIES.register("flux")
class Flux(Family):
    name = "flux"
    text_parts = ("clip_l", "t5")
    bucket_step = 32
    options = _flux_parts.OPTIONS | {"clip_l"}
    sampling = Sampling(width=512, height=512, steps=20, scale=1.0, guidance=DEFAULT_GUIDANCE, size_multiple=16)
    components = COMPONENTS

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module, model: ModelOptions) -> None:
        super().__init__(blueprint, parts, vae)
        self.guided = bool(blueprint.networks["denoiser"].config["guidance_embeds"])
        self.masked = model.apply_t5_attn_mask
        self.t5_length = model.t5xxl_max_token_length or T5_LENGTH[self.guided]
        clip, t5 = (*model.tokenizer, None, None)[:2]
        source = blueprint.source
        self.clip_tokenizer: Any = _tokenizers.clip_tokenizer(_flux_parts.tokenizer_folder(source, clip, "tokenizer"))
        self.t5_tokenizer: Any = _flux_parts.t5_tokenizer(source, t5, "tokenizer_2")
        _clip.check_vocabulary(self.clip_tokenizer, self.parts["clip_l"].module)

    @classmethod
    def detect(cls, source: Source) -> bool:
        return _flux_keys.TRANSFORMER.is_in(source)

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        denoiser = _flux_keys.TRANSFORMER.network(source)
        vae = _flux_parts.read_vae(component(source, "ae", model.ae, "vae"), denoiser)
        guided = bool(denoiser.config["guidance_embeds"])
        return Blueprint(
            source=source,
            title="FLUX.1 dev" if guided else "FLUX.1 schnell",
            base_model_version="flux1",
            architecture="flux-1-dev" if guided else "flux-1-schnell",
            text_parts=cls.text_parts,
            networks={
                "denoiser": denoiser,
                "clip_l": _read_clip(component(source, "clip_l", model.clip_l, "text_encoder"), denoiser),
                "t5": _flux_parts.read_t5(component(source, "t5xxl", model.t5xxl, "text_encoder_2"), denoiser),
                "vae": vae,
            },
            objective=_flux_parts.objective(noise, shifted=guided),
            latents=_vae.latent_spec(vae.config, patch=2, size_multiple=16),
            metadata=_flux_parts.metadata("flux", model, noise, DEFAULT_GUIDANCE),
        )

    @classmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        builders = {
            "denoiser": _flux_keys.build,
            "clip_l": _clip.build,
            "t5": _t5.build,
        }
        parts = blueprint.load(builders, dtype=dtype, device=device)
        vae_dtype = _vae.precision(dtype, whole=model.no_half_vae)
        vae = blueprint.networks["vae"].load(_vae.build, dtype=vae_dtype, device=device)
        return cls(blueprint, parts, vae, model)

    @classmethod
    def adapted(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        return {"denoiser": _flux_keys.spec(""), "clip_l": clip_spec(), "t5": _flux_parts.t5_spec()}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder: Any = self.parts[part].module
        if part == "clip_l":
            ids = _clip.token_ids(self.clip_tokenizer, captions, encoder.device)
            return [{"pooled": pooled} for pooled in _clip.pooled(encoder, ids, self.clip_tokenizer.eos_token_id)]
        ids, mask = _t5.token_ids(self.t5_tokenizer, captions, self.t5_length, encoder.device)
        hidden = _t5.hidden_states(encoder, ids, mask if self.masked else None)
        if not self.masked:  # padding is attended to: every position counts
            return [{"hidden": one} for one in hidden]
        lengths = mask.sum(1).tolist()
        return [{"hidden": one[:n], "mask": real[:n]} for one, real, n in zip(hidden, mask, lengths, strict=True)]

    def weigh(self, part: str, features: Tensors, pieces: Pieces) -> Tensors:
        if part == "clip_l":  # only its summary of the whole text is used
            return features
        weights = _t5.token_weights(self.t5_tokenizer, pieces, len(features["hidden"]))
        return {**features, "hidden": features["hidden"] * weights.to(features["hidden"])[:, None]}

    def room(self, part: str, captions: Sequence[str]) -> Room:
        if part == "t5":
            return Room(_tokenizers.lengths(self.t5_tokenizer, captions), self.t5_length - 1)
        return Room(_tokenizers.lengths(self.clip_tokenizer, captions), _clip.CHUNK)

    def text_fingerprint(self, part: str) -> str:
        return f"{self.t5_length} tokens, masked {self.masked}" if part == "t5" else f"{_clip.LENGTH} tokens, pooled"

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        conditioning = {
            "pooled_projections": features["clip_l"]["pooled"],
            "encoder_hidden_states": features["t5"]["hidden"],
        }
        batch = len(features["clip_l"]["pooled"])
        if self.masked and batch > 1:  # one caption alone has no padding
            conditioning["attention_mask"] = features["t5"]["mask"]
        if self.guided:
            strength = DEFAULT_GUIDANCE if guidance is None else guidance
            conditioning["guidance"] = torch.full((batch,), strength, device=self.device)
        return conditioning

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae.encode(self.vae, self.latents, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return _vae.decode(self.vae, self.latents, latents)

    def inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        text = conditioning["encoder_hidden_states"]
        arguments: dict[str, object] = {
            "hidden_states": pack(noisy),
            "timestep": t.to(noisy.device) / 1000,
            "pooled_projections": conditioning["pooled_projections"].to(noisy.dtype),
            "encoder_hidden_states": text.to(noisy.dtype),
            "img_ids": image_ids(noisy),
            "txt_ids": noisy.new_zeros(text.shape[1], 3),
        }
        if "guidance" in conditioning:
            arguments["guidance"] = conditioning["guidance"].to(noisy.dtype)
        if "attention_mask" in conditioning:
            mask = whole_mask(conditioning["attention_mask"], noisy)
            arguments["joint_attention_kwargs"] = {"attention_mask": mask[:, None, None, :]}
        return arguments

    def output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return unpack(raw, noisy.shape)


def _read_clip(path: Path, denoiser: Network) -> Network:
    source = Source(path)
    with told_of("clip_l"):
        weights = Weights(file=source.component(), key_map=_clip.FILE_KEYS)
        config = _clip.read_config(source, weights)
    check_width("clip_l", path, WIDTH, config["hidden_size"], denoiser.config["pooled_projection_dim"])
    return Network(spec=clip_spec(), config=config, weights=weights, option="clip_l")
