"""Chroma, made from FLUX.1 schnell: T5-XXL alone, whose padding is masked except for one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import WeightedText
from sfumato.errors import Problems
from sfumato.families import _chroma_keys, _flux_files, _flux_parts, _t5, _tokenizers, _vae
from sfumato.families._flux_parts import extend_mask, make_common_inputs, unpack
from sfumato.families._text_features import cut_to_mask, to_device
from sfumato.families.base import FAMILIES, Family, TokenBudget
from sfumato.families.blueprint import Blueprint, Component, Sampling
from sfumato.families.part import Builder, Network, PartSpec
from sfumato.families.source import Source, find_component, find_present

_T5_LENGTH = 512
_COMPONENTS = {
    "denoiser": Component(folder="transformer"),
    "t5": Component(folder="text_encoder", takes_lora=False, comfyui_prefix="lora_te1"),
}


@FAMILIES.register("chroma")
class Chroma(Family):
    name = "chroma"
    text_parts = ("t5",)
    bucket_step = 32
    options = _flux_parts.FLUX_OPTIONS
    sd_scripts_reads = _flux_parts.READ_BY_SCRIPT
    sampling = Sampling(width=512, height=512, steps=20, scale=1.0, guidance=None, size_multiple=16)
    components = _COMPONENTS
    list_controlled_layers = staticmethod(_chroma_keys.list_chroma_layers)

    def __init__(self, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(blueprint, model, dtype=dtype, device=device)
        self.t5_length = model.t5xxl_max_token_length or _T5_LENGTH

    @classmethod
    def detect(cls, source: Source) -> bool:
        return _chroma_keys.CHROMA_TRANSFORMER.is_in(source)

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        check_options(model)
        denoiser = _chroma_keys.CHROMA_TRANSFORMER.read(source)
        ae = find_component(source, "vae", "ae", model.ae, "vae", *_vae.VAE_PREFIXES)
        t5 = find_component(source, "t5", "t5xxl", model.t5xxl, "text_encoder", _flux_files.T5_IN_WHOLE)
        vae = _flux_files.read_flux_vae(ae, denoiser)
        return Blueprint(
            source=source,
            title="Chroma",
            base_model_version=cls.name_base_model(denoiser),
            implementation="https://huggingface.co/lodestones/Chroma",
            architecture="chroma",
            text_parts=cls.text_parts,
            masks_attention=True,
            lr_order=("clip_l", "t5"),  # those of FLUX.1, whose scripts train it
            networks={
                "denoiser": denoiser,
                "t5": _flux_files.read_t5(t5, denoiser, _t5_spec),
                "vae": vae,
            },
            objective=_flux_parts.make_objective(noise, shifted=True),
            latents=_vae.make_latent_spec(vae.config, patch=2, size_multiple=16),
            metadata=_flux_parts.make_metadata("chroma", model, noise, 0.0),
        )

    @classmethod
    def read_networks(cls, source: Source, model: ModelOptions) -> dict[str, Network]:
        networks = {"denoiser": _chroma_keys.CHROMA_TRANSFORMER.read(source)}
        t5 = find_present(source, "t5xxl", model.t5xxl, "text_encoder", _flux_files.T5_IN_WHOLE)
        if t5:
            networks["t5"] = _flux_files.read_t5(t5, networks["denoiser"], _t5_spec)
        return networks

    @classmethod
    def load_tokenizers(cls, blueprint: Blueprint, model: ModelOptions) -> dict[str, Any]:
        folder = "tokenizer" if blueprint.source.is_folder else "tokenizer_2"  # beside a file: FLUX.1's folder
        given = model.tokenizer[-1] if model.tokenizer else None  # the last one where FLUX.1's two are given
        return {"t5": _flux_files.find_t5_tokenizer(blueprint, given, folder)}

    @classmethod
    def builders(cls, blueprint: Blueprint) -> Mapping[str, Builder]:
        return {"denoiser": _chroma_keys.build, "t5": _t5.build}

    @classmethod
    def adapter_specs(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        return {"denoiser": _chroma_keys.spec(""), "t5": _t5_spec()}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        """The caption's tokens and one of padding, with which the model was trained."""
        encoder = self.parts[part]
        ids, mask = _t5.tokenize(self.tokenizers["t5"], captions, self.t5_length)
        hidden = _t5.encode_tokens(encoder.module, *to_device(encoder.device, ids, mask))
        lengths = mask.sum(1, keepdim=True)
        return cut_to_mask(hidden, torch.arange(mask.shape[1]) <= lengths)

    def apply_prompt_weights(self, part: str, features: Tensors, pieces: WeightedText) -> Tensors:
        return _t5.apply_prompt_weights(self.tokenizers["t5"], features, pieces)

    def token_budget(self, part: str, captions: Sequence[str]) -> TokenBudget:
        return TokenBudget(_tokenizers.count_tokens(self.tokenizers["t5"], captions), self.t5_length - 1)

    def text_fingerprint(self, part: str) -> str:
        return f"{self.t5_length} tokens, masked but for one of padding"

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        """Without guidance, which the model has not."""
        conditioning = {"encoder_hidden_states": features["t5"]["hidden"]}
        if len(features["t5"]["hidden"]) > 1:  # one caption alone has no padding
            conditioning["attention_mask"] = features["t5"]["mask"]
        return conditioning

    def make_inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        arguments = make_common_inputs(noisy, t, conditioning["encoder_hidden_states"])
        if "attention_mask" in conditioning:
            arguments["attention_mask"] = extend_mask(conditioning["attention_mask"], noisy)
        return arguments

    def convert_output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return unpack(raw, noisy.shape)


def _t5_spec(prefix: str = "") -> PartSpec:
    """Other programs count T5 as the only encoder, sd-scripts as the third."""
    note = (
        "ComfyUI looks for T5's layers under lora_te1_ instead of sd-scripts' lora_te3_: `sfumato lora convert FILE "
        "NEW --to comfyui --family chroma` renames them"
    )
    return _t5.spec(prefix, names=("lora_te1", "lora_te", "text_encoder"), note=note)


def check_options(model: ModelOptions) -> None:
    """Raise UserError unless the options say what the model was trained with, as sd-scripts requires."""
    problems = Problems()
    if not model.apply_t5_attn_mask:
        problems.add(
            "Chroma was trained with masked padding",
            code="chroma-attention-mask-missing",
            fix="--apply_t5_attn_mask",
        )
    if model.guidance_scale:
        problems.add(
            f"--guidance_scale {model.guidance_scale:g}: Chroma has no embedded guidance except 0",
            code="chroma-guidance-scale",
            fix="--guidance_scale 0",
        )
    problems.raise_all()
