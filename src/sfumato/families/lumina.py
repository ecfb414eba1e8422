"""Lumina-Image 2.0: Gemma 2, a transformer over one sequence of text and image tokens, FLUX.1's autoencoder.

The model's time runs from noise (0) to image (1), and its velocity points to the image; `make_inputs` and
`convert_output` invert both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import WeightedText
from sfumato.diffusion.objective import RectifiedFlow, TimestepGrid
from sfumato.diffusion.timesteps import make_time_grid, shift_sigma
from sfumato.errors import UserError
from sfumato.families import _gemma2, _lumina_keys, _vae
from sfumato.families._lumina_files import LUMINA_TEXT_PREFIX, find_tokenizer, read_lumina_vae
from sfumato.families.base import FAMILIES, Family, TokenBudget
from sfumato.families.blueprint import Blueprint, Component, Sampling
from sfumato.families.part import DENOISER_PREFIX, Builder, Network, PartSpec
from sfumato.families.source import Source, find_component, find_present

_PROMPT_START = " <Prompt Start> "  # between the system prompt and the caption
_DEFAULT_SAMPLING, _DEFAULT_SHIFT = "shift", 6.0
_COMPONENTS = {
    "denoiser": Component(folder="transformer"),
    "gemma2": Component(folder="text_encoder", takes_lora=False),
}


@FAMILIES.register("lumina")
class Lumina(Family):
    name = "lumina"
    text_parts = ("gemma2",)
    bucket_step = 16
    components = _COMPONENTS
    list_controlled_layers = staticmethod(_lumina_keys.list_lumina_layers)
    options = frozenset(
        {"gemma2", "ae", "no_half_vae", "gemma2_max_token_length", "system_prompt"}
        | {"add_system_prompt_to_negative_prompt"}
        | {"timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type"}
        | {"weighting_scheme", "logit_mean", "logit_std", "mode_scale"}
        | {"weighted_captions", "prompt_weighting"}
    )
    sampling = Sampling(
        width=1024, height=1024, steps=38, scale=3.5, guidance=None, size_multiple=16, cfg_trunc_ratio=0.25,
        renorm_cfg=1.0,
    )  # fmt: skip

    def __init__(self, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(blueprint, model, dtype=dtype, device=device)
        self.length = model.gemma2_max_token_length or _gemma2.GEMMA2_LENGTH
        self.prompt_prefix = model.system_prompt + _PROMPT_START if model.system_prompt else ""

    def unread_layers(self, part: str) -> Sequence[str]:
        if part != "gemma2":
            return ()
        return (f"layers.{self.blueprint.networks[part].config['num_hidden_layers'] - 1}.{{*}}", "norm.{*}")

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            network = "Lumina2Transformer2DModel"
            return source.has_network("transformer") and source.read_config("transformer")["_class_name"] == network
        keys = {key.removeprefix(DENOISER_PREFIX) for key in source.shapes}
        return {"cap_embedder.1.weight", "layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight"} <= keys

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        denoiser = _lumina_keys.read_lumina_transformer(source)
        _check_length(denoiser, model)
        ae = find_component(source, "vae", "ae", model.ae, "vae", *_vae.VAE_PREFIXES)
        vae = read_lumina_vae(ae, denoiser)
        gemma2 = find_component(source, "gemma2", "gemma2", model.gemma2, "text_encoder", LUMINA_TEXT_PREFIX)
        space, shift = noise.model_prediction_type or "raw", noise.discrete_flow_shift or _DEFAULT_SHIFT
        return Blueprint(
            source=source,
            title="Lumina-Image 2.0",
            base_model_version=cls.name_base_model(denoiser),
            architecture="lumina-2",
            implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0",
            text_parts=cls.text_parts,
            masks_attention=True,
            networks={
                "denoiser": denoiser,
                "gemma2": _gemma2.read_gemma2(gemma2, LUMINA_TEXT_PREFIX, width=denoiser.config["cap_feat_dim"]),
                "vae": vae,
            },
            objective=RectifiedFlow(
                space=space,
                grid=make_lumina_grid(shift),
                make_grid=make_lumina_grid,
                default_sampling=_DEFAULT_SAMPLING,
                default_shift=_DEFAULT_SHIFT,
            ),
            latents=_vae.make_latent_spec(vae.config, patch=_lumina_keys.PATCH, size_multiple=16),
            metadata=_make_metadata(noise, space, shift),
        )

    @classmethod
    def read_networks(cls, source: Source, model: ModelOptions) -> dict[str, Network]:
        networks = {"denoiser": _lumina_keys.read_lumina_transformer(source)}
        gemma2 = find_present(source, "gemma2", model.gemma2, "text_encoder", LUMINA_TEXT_PREFIX)
        if gemma2:
            width = networks["denoiser"].config["cap_feat_dim"]
            networks["gemma2"] = _gemma2.read_gemma2(gemma2, LUMINA_TEXT_PREFIX, width=width)
        return networks

    @classmethod
    def name_base_model(cls, denoiser: Network) -> str:
        return "lumina2"

    @classmethod
    def load_tokenizers(cls, blueprint: Blueprint, model: ModelOptions) -> dict[str, Any]:
        return {"gemma2": find_tokenizer(blueprint, model)}

    @classmethod
    def builders(cls, blueprint: Blueprint) -> Mapping[str, Builder]:
        return {"denoiser": _lumina_keys.build, "gemma2": _gemma2.build}

    @classmethod
    def adapter_specs(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        return {"denoiser": _lumina_keys.spec(""), "gemma2": _gemma2.spec(LUMINA_TEXT_PREFIX)}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        return _gemma2.encode_gemma2(self.parts[part], self.tokenizers["gemma2"], captions, self.length)

    def apply_prompt_weights(self, part: str, features: Tensors, pieces: WeightedText) -> Tensors:
        return _gemma2.apply_prompt_weights(self.tokenizers["gemma2"], features, pieces, self.length)

    def token_budget(self, part: str, captions: Sequence[str]) -> TokenBudget:
        prefix = len(self.tokenizers["gemma2"].tokenize(self.prompt_prefix))
        return TokenBudget(
            [len(self.tokenizers["gemma2"].tokenize(caption)) for caption in captions], self.length - 1 - prefix
        )

    def text_fingerprint(self, part: str) -> str:
        return f"{self.length} tokens after {self.prompt_prefix!r}"

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        text = features["gemma2"]
        return {"encoder_hidden_states": text["hidden"], "encoder_attention_mask": text["mask"]}

    def make_inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        return {
            "hidden_states": noisy,
            "timestep": 1 - t.to(noisy.device, non_blocking=True) / 1000,
            "encoder_hidden_states": conditioning["encoder_hidden_states"].to(noisy.dtype),
            "encoder_attention_mask": conditioning["encoder_attention_mask"],
        }

    def convert_output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return -raw


def make_lumina_grid(shift: float) -> TimestepGrid:
    """Even steps, moved towards noise by a shift that does not depend on the resolution."""
    return make_time_grid(lambda steps, tokens: shift_sigma(torch.linspace(1, 1 / steps, steps), shift).tolist())


def _check_length(denoiser: Network, model: ModelOptions) -> None:
    """Raise UserError where captions would take the position of the image, which is the last one."""
    positions = (denoiser.config.get("axes_lens") or (300,))[0]
    if (model.gemma2_max_token_length or 0) >= positions:
        raise UserError(
            f"--gemma2_max_token_length {model.gemma2_max_token_length}: the model has positions for {positions - 1} "
            "tokens",
            code="gemma2-length-exceeded",
            fix=f"at most {positions - 1}; default {_gemma2.GEMMA2_LENGTH}",
        )


def _make_metadata(noise: NoiseOptions, space: str, shift: float) -> dict[str, Any]:
    return {
        "ss_timestep_sampling": noise.timestep_sampling or _DEFAULT_SAMPLING,
        "ss_discrete_flow_shift": shift,
        "ss_model_prediction_type": space,
        "ss_sigmoid_scale": noise.sigmoid_scale,
        "ss_weighting_scheme": noise.weighting_scheme,
        "ss_logit_mean": noise.logit_mean,
        "ss_logit_std": noise.logit_std,
        "ss_mode_scale": noise.mode_scale,
    }
