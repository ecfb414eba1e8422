"""FLUX.1 dev and schnell: CLIP-L for a pooled vector, T5-XXL for the tokens, a transformer over packed latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import INPAINT, Images, Sizes, Tensors
from sfumato.data.prompt_weighting import WeightedText
from sfumato.families import _clip, _flux_files, _flux_keys, _flux_parts, _t5, _tokenizers, _vae
from sfumato.families._flux_control_net import FLUX_CONTROL_NET
from sfumato.families._flux_parts import add_masked_image, extend_mask, make_common_inputs, unpack
from sfumato.families.base import FAMILIES, Family, TokenBudget
from sfumato.families.blueprint import Blueprint, Component, Sampling
from sfumato.families.part import Builder, Network, PartSpec
from sfumato.families.source import Source, find_component, find_present

_FEW_STEPS = 4
_T5_LENGTHS = {True: 512, False: 256}  # with embedded guidance (dev), without (schnell)
_DEFAULT_GUIDANCE = 3.5
_FILL_GUIDANCE = 30.0  # with which FLUX.1 Fill was distilled
_COMPONENTS = {
    "denoiser": Component(folder="transformer"),
    "clip_l": Component(folder="text_encoder", key_map=_clip.key_map()),
    "t5": Component(folder="text_encoder_2", takes_lora=False),
}


@FAMILIES.register("flux")
class Flux(Family):
    name = "flux"
    text_parts = ("clip_l", "t5")
    bucket_step = 32
    options = _flux_parts.FLUX_OPTIONS | {"clip_l"}
    sd_scripts_reads = _flux_parts.READ_BY_SCRIPT
    has_pooled_text = True
    sampling = Sampling(width=512, height=512, steps=20, scale=1.0, guidance=_DEFAULT_GUIDANCE, size_multiple=16)
    components = _COMPONENTS
    control_net = FLUX_CONTROL_NET
    list_controlled_layers = staticmethod(_flux_keys.list_flux_layers)

    def __init__(self, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(blueprint, model, dtype=dtype, device=device)
        self.guided = bool(blueprint.networks["denoiser"].config["guidance_embeds"])
        if not self.guided:  # schnell
            self.sampling = replace(self.sampling, steps=_FEW_STEPS, is_distilled=True)
        self.masked = model.apply_t5_attn_mask
        self.guidance = _choose_guidance(blueprint.networks["denoiser"])  # the default
        self.sampling = replace(self.sampling, guidance=self.guidance)
        self.t5_length = model.t5xxl_max_token_length or _T5_LENGTHS[self.guided]

    @classmethod
    def detect(cls, source: Source) -> bool:
        return _flux_keys.FLUX_TRANSFORMER.is_in(source) and not _flux_files.is_kontext(source)

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        denoiser = _flux_keys.FLUX_TRANSFORMER.read(source)
        ae = find_component(source, "vae", "ae", model.ae, "vae", *_vae.VAE_PREFIXES)
        clip_l = find_component(source, "clip_l", "clip_l", model.clip_l, "text_encoder", _flux_files.CLIP_L_IN_WHOLE)
        t5 = find_component(source, "t5", "t5xxl", model.t5xxl, "text_encoder_2", _flux_files.T5_IN_WHOLE)
        vae = _flux_files.read_flux_vae(ae, denoiser)
        guided, inpaints = bool(denoiser.config["guidance_embeds"]), _flux_files.inpaints(denoiser)
        return Blueprint(
            source=source,
            title="FLUX.1 Fill" if inpaints else "FLUX.1 dev" if guided else "FLUX.1 schnell",
            base_model_version=cls.name_base_model(denoiser),
            implementation="https://github.com/black-forest-labs/flux",
            architecture=_flux_parts.FILL if inpaints else "flux-1-dev" if guided else "flux-1-schnell",
            inpaints=inpaints,
            text_parts=cls.text_parts,
            masks_attention=model.apply_t5_attn_mask,
            networks={
                "denoiser": denoiser,
                "clip_l": _flux_files.read_clip_l(clip_l, denoiser, _clip_spec),
                "t5": _flux_files.read_t5(t5, denoiser, _t5_spec),
                "vae": vae,
            },
            objective=_flux_parts.make_objective(noise, shifted=guided),
            latents=_vae.make_latent_spec(vae.config, patch=2, size_multiple=16),
            metadata=_flux_parts.make_metadata("flux", model, noise, _choose_guidance(denoiser)),
        )

    @classmethod
    def read_networks(cls, source: Source, model: ModelOptions) -> dict[str, Network]:
        networks = {"denoiser": _flux_keys.FLUX_TRANSFORMER.read(source)}
        clip_l = find_present(source, "clip_l", model.clip_l, "text_encoder", _flux_files.CLIP_L_IN_WHOLE)
        t5 = find_present(source, "t5xxl", model.t5xxl, "text_encoder_2", _flux_files.T5_IN_WHOLE)
        if clip_l:
            networks["clip_l"] = _flux_files.read_clip_l(clip_l, networks["denoiser"], _clip_spec)
        if t5:
            networks["t5"] = _flux_files.read_t5(t5, networks["denoiser"], _t5_spec)
        return networks

    @classmethod
    def name_base_model(cls, denoiser: Network) -> str:
        return "flux1"

    @classmethod
    def load_tokenizers(cls, blueprint: Blueprint, model: ModelOptions) -> dict[str, Any]:
        clip, t5 = (*model.tokenizer, None, None)[:2]
        folder = _flux_files.find_tokenizer_folder(blueprint, "clip_l", clip, "tokenizer")
        tokenizer = _tokenizers.load_clip_tokenizer(folder)
        _clip.check_vocabulary(tokenizer, blueprint.networks["clip_l"].config)
        return {"clip_l": tokenizer, "t5": _flux_files.find_t5_tokenizer(blueprint, t5, "tokenizer_2")}

    @classmethod
    def builders(cls, blueprint: Blueprint) -> Mapping[str, Builder]:
        return {"denoiser": _flux_keys.build, "clip_l": _clip.build, "t5": _t5.build}

    @classmethod
    def adapter_specs(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        return {"denoiser": _flux_keys.spec(""), "clip_l": _clip_spec(), "t5": _t5_spec()}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder = self.parts[part]
        if part == "t5":
            return _t5.encode_t5(encoder, self.tokenizers["t5"], captions, self.t5_length, masked=self.masked)
        ids = _clip.tokenize(self.tokenizers["clip_l"], captions, encoder.device)
        pooled = _clip.encode_pooled(encoder.module, ids, self.tokenizers["clip_l"].eos_token_id)
        return [{"pooled": vector} for vector in pooled]

    def apply_prompt_weights(self, part: str, features: Tensors, pieces: WeightedText) -> Tensors:
        return _t5.apply_prompt_weights(self.tokenizers["t5"], features, pieces) if part == "t5" else features

    def token_budget(self, part: str, captions: Sequence[str]) -> TokenBudget:
        if part == "t5":
            return TokenBudget(_tokenizers.count_tokens(self.tokenizers["t5"], captions), self.t5_length - 1)
        return TokenBudget(_tokenizers.count_tokens(self.tokenizers["clip_l"], captions), _clip.CHUNK_LENGTH)

    def text_fingerprint(self, part: str) -> str:
        return (
            f"{self.t5_length} tokens, masked {self.masked}" if part == "t5" else f"{_clip.CLIP_LENGTH} tokens, pooled"
        )

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        conditioning = {
            "pooled_projections": features["clip_l"]["pooled"],
            "encoder_hidden_states": features["t5"]["hidden"],
        }
        batch = len(features["clip_l"]["pooled"])
        if self.masked and batch > 1:  # one caption alone has no padding
            conditioning["attention_mask"] = features["t5"]["mask"]
        if self.guided:
            strength = self.guidance if guidance is None else guidance
            conditioning["guidance"] = torch.full((batch,), strength, device=self.device)
        return conditioning

    def make_inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        arguments = make_common_inputs(noisy, t, conditioning["encoder_hidden_states"])
        arguments["pooled_projections"] = conditioning["pooled_projections"].to(noisy.dtype)
        if "guidance" in conditioning:
            arguments["guidance"] = conditioning["guidance"].to(noisy.dtype)
        if "attention_mask" in conditioning:
            mask = extend_mask(conditioning["attention_mask"], noisy)
            arguments["joint_attention_kwargs"] = {"attention_mask": mask[:, None, None, :]}
        return arguments

    def shrink_mask(self, masks: Tensor) -> Tensor:
        """Every pixel of the masks, those of one latent pixel as its channels."""
        return F.pixel_unshuffle(masks, self.latents.downscale)

    def add_images(self, arguments: dict[str, object], noisy: Tensor, images: Images) -> dict[str, object]:
        if not self.blueprint.inpaints:
            return arguments
        inpaint = images[INPAINT].latents
        assert inpaint is not None
        return add_masked_image(arguments, inpaint, self.latents.channels)

    def convert_output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return unpack(raw, noisy.shape)


def _choose_guidance(denoiser: Network) -> float:
    """The default strength of embedded guidance."""
    return _FILL_GUIDANCE if _flux_files.inpaints(denoiser) else _DEFAULT_GUIDANCE


def _clip_spec(prefix: str = "") -> PartSpec:
    return _clip.spec("clip_l", prefix, "lora_te1", names=_clip.CLIP_L_NAMES)


def _t5_spec(prefix: str = "") -> PartSpec:
    """OneTrainer and ComfyUI count T5 as the second encoder."""
    note = "InvokeAI does not recognize LoRA files that adapt T5"
    return _t5.spec(prefix, names=("lora_te2", "text_encoder_2"), note=note)
