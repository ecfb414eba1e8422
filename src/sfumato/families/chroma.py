"""Chroma: made from FLUX.1 schnell, reads text with T5-XXL alone and hides all its padding but one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import Pieces
from sfumato.errors import Problems
from sfumato.families import _chroma_keys, _flux_parts, _t5, _tokenizers, _vae
from sfumato.families._flux_parts import component, image_ids, pack, unpack, whole_mask
from sfumato.families.base import FAMILIES, Blueprint, Component, Family, Part, PartSpec, Room, Sampling
from sfumato.families.source import Source

T5_LENGTH = 512
COMPONENTS = {
    "denoiser": Component(folder="transformer"),
    "t5": Component(folder="text_encoder", takes_lora=False),
}


@FAMILIES.register("chroma")
class Chroma(Family):
    name = "chroma"
    text_parts = ("t5",)
    bucket_step = 32
    options = _flux_parts.OPTIONS
    sampling = Sampling(width=512, height=512, steps=20, scale=1.0, guidance=None, size_multiple=16)
    components = COMPONENTS

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module, model: ModelOptions) -> None:
        super().__init__(blueprint, parts, vae)
        self.t5_length = model.t5xxl_max_token_length or T5_LENGTH
        folder = "tokenizer" if blueprint.source.is_folder else "tokenizer_2"  # diffusers', else beside the checkpoint
        given = model.tokenizer[-1] if model.tokenizer else None  # the last of FLUX.1's two
        self.tokenizer: Any = _flux_parts.t5_tokenizer(blueprint.source, given, folder)

    @classmethod
    def detect(cls, source: Source) -> bool:
        return _chroma_keys.TRANSFORMER.is_in(source)

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        check(model)
        denoiser = _chroma_keys.TRANSFORMER.network(source)
        vae = _flux_parts.read_vae(component(source, "ae", model.ae, "vae"), denoiser)
        return Blueprint(
            source=source,
            title="Chroma",
            base_model_version="chroma",
            architecture="chroma",
            text_parts=cls.text_parts,
            networks={
                "denoiser": denoiser,
                "t5": _flux_parts.read_t5(component(source, "t5xxl", model.t5xxl, "text_encoder"), denoiser),
                "vae": vae,
            },
            objective=_flux_parts.objective(noise, shifted=True),
            latents=_vae.latent_spec(vae.config, patch=2, size_multiple=16),
            metadata=_flux_parts.metadata("chroma", model, noise, 0.0),
        )

    @classmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        parts = blueprint.load({"denoiser": _chroma_keys.build, "t5": _t5.build}, dtype=dtype, device=device)
        vae_dtype = _vae.precision(dtype, whole=model.no_half_vae)
        vae = blueprint.networks["vae"].load(_vae.build, dtype=vae_dtype, device=device)
        return cls(blueprint, parts, vae, model)

    @classmethod
    def adapted(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        return {"denoiser": _chroma_keys.spec(""), "t5": _flux_parts.t5_spec()}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        """The words and one token of padding after them, which this model was trained to see."""
        encoder: Any = self.parts[part].module
        ids, mask = _t5.token_ids(self.tokenizer, captions, self.t5_length, encoder.device)
        hidden = _t5.hidden_states(encoder, ids, mask)
        seen = [one[: n + 1] for one, n in zip(hidden, mask.sum(1).tolist(), strict=True)]
        return [{"hidden": one, "mask": torch.ones(len(one), dtype=torch.bool, device=one.device)} for one in seen]

    def weigh(self, part: str, features: Tensors, pieces: Pieces) -> Tensors:
        weights = _t5.token_weights(self.tokenizer, pieces, len(features["hidden"]))
        return {**features, "hidden": features["hidden"] * weights.to(features["hidden"])[:, None]}

    def room(self, part: str, captions: Sequence[str]) -> Room:
        return Room(_tokenizers.lengths(self.tokenizer, captions), self.t5_length - 1)

    def text_fingerprint(self, part: str) -> str:
        return f"{self.t5_length} tokens, masked but for one of padding"

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        """Guidance is always 0 here; diffusers' network does not ask for it."""
        hidden = features["t5"]["hidden"]
        alone = {"encoder_hidden_states": hidden}  # one caption has no further padding
        return alone if len(hidden) == 1 else alone | {"attention_mask": features["t5"]["mask"]}

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae.encode(self.vae, self.latents, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return _vae.decode(self.vae, self.latents, latents)

    def inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        text = conditioning["encoder_hidden_states"]
        arguments: dict[str, object] = {
            "hidden_states": pack(noisy),
            "timestep": t.to(noisy.device) / 1000,
            "encoder_hidden_states": text.to(noisy.dtype),
            "img_ids": image_ids(noisy),
            "txt_ids": noisy.new_zeros(text.shape[1], 3),
        }
        if "attention_mask" in conditioning:
            arguments["attention_mask"] = whole_mask(conditioning["attention_mask"], noisy)
        return arguments

    def output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return unpack(raw, noisy.shape)


def check(model: ModelOptions) -> None:
    """What this model was made with is asked of the user in so many words, as everywhere in the field."""
    problems = Problems()
    if not model.apply_t5_attn_mask:
        problems.add("Chroma does not know text without its mask", fix="--apply_t5_attn_mask")
    if model.guidance_scale:
        problems.add(
            f"--guidance_scale {model.guidance_scale:g}: Chroma knows no other embedded guidance than 0",
            fix="--guidance_scale 0",
        )
    problems.raise_all()
