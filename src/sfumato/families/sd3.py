"""Stable Diffusion 3 and 3.5: CLIP-L, CLIP-G and T5-XXL, a transformer with joint attention of text and image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import WeightedText
from sfumato.diffusion.objective import RectifiedFlow, TimestepGrid
from sfumato.diffusion.timesteps import make_time_grid, shift_sigma
from sfumato.families import _clip, _sd3_keys, _sd3_text, _t5, _vae
from sfumato.families._sd3_control_net import SD3_CONTROL_NET
from sfumato.families.base import FAMILIES, Family, Place, TokenBudget
from sfumato.families.blueprint import STABILITY_AI, Blueprint, Component, Sampling
from sfumato.families.part import DENOISER_PREFIX, Builder, Network, PartSpec
from sfumato.families.source import Source

_CLIPS = ("clip_l", "clip_g")
_COMPONENTS = {"denoiser": Component(folder="transformer"), **_sd3_text.TEXT_COMPONENTS}
_T5_LENGTH = 256
SD3_VAE_SCALING = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
SD3_SHIFT = 3.0  # of the time grid in sampling
_TITLES = {"medium": "3 medium", "5-medium": "3.5 medium", "5-large": "3.5 large"}
_T5_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@FAMILIES.register("sd3")
class StableDiffusion3(Family):
    name = "sd3"
    text_parts = ("clip_l", "clip_g", "t5")
    bucket_step = 32
    options = frozenset(
        {"vae", "no_half_vae", "clip_l", "clip_g", "t5xxl", "t5xxl_max_token_length", "t5xxl_device", "t5xxl_dtype"}
        | {"apply_lg_attn_mask", "apply_t5_attn_mask", "clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"}
        | {
            "pos_emb_random_crop_rate",
            "enable_scaled_pos_embed",
            "weighted_captions",
            "prompt_weighting",
            "emb_normalize_mode",
        }
        | {"weighting_scheme", "logit_mean", "logit_std", "mode_scale", "training_shift"}
        | {"timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type"}
    )
    sd_scripts_reads = frozenset({"min_timestep", "max_timestep", "weighting_scheme"})
    has_pooled_text = True
    sampling = Sampling(width=512, height=512, steps=30, scale=7.5, guidance=None, size_multiple=16)
    components = _COMPONENTS
    control_net = SD3_CONTROL_NET
    list_controlled_layers = staticmethod(_sd3_keys.list_sd3_layers)

    def __init__(self, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(blueprint, model, dtype=dtype, device=device)
        self.masked = {"clip_l": model.apply_lg_attn_mask, "clip_g": model.apply_lg_attn_mask}
        self.masked["t5"] = model.apply_t5_attn_mask
        self.t5_length = model.t5xxl_max_token_length or _T5_LENGTH
        self.text_width = blueprint.networks["denoiser"].config["joint_attention_dim"]
        self.scaled_sides: set[int] = set()  # in patches, of the images that get a position table of their own

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            network = "SD3Transformer2DModel"
            return source.has_network("transformer") and source.read_config("transformer")["_class_name"] == network
        keys = {key.removeprefix(DENOISER_PREFIX) for key in source.shapes}
        original = {"joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight", "pos_embed"}
        return original <= keys or {"transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.pos_embed"} <= keys

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        denoiser = _sd3_keys.read_sd3_transformer(source)
        networks = {"denoiser": denoiser, **_sd3_text.read_others(source, model, denoiser, SD3_VAE_SCALING)}
        version = _sd3_keys.get_version(denoiser.config)
        return Blueprint(
            source=source,
            checkpoint_implementation=STABILITY_AI,
            title=f"Stable Diffusion {_TITLES[version]}" + ("" if "t5" in networks else ", without T5-XXL"),
            base_model_version=cls.name_base_model(denoiser),
            architecture=f"stable-diffusion-3-{version}",
            text_parts=tuple(part for part in cls.text_parts if part in networks),
            lr_order=cls.text_parts,
            networks=networks,
            objective=RectifiedFlow(
                space=noise.model_prediction_type or "sigma_scaled",
                grid=make_sd3_grid(SD3_SHIFT),
                make_grid=make_sd3_grid,
                default_sampling="whole_steps",
            ),
            latents=_vae.make_latent_spec(networks["vae"].config, patch=2, size_multiple=16),
            checkpoint=("denoiser", "vae"),
            metadata=_make_metadata(model, noise),
            notes=(*_note_unused_options(networks, model, noise), *_note_position_options(version, model)),
        )

    @classmethod
    def read_networks(cls, source: Source, model: ModelOptions) -> dict[str, Network]:
        networks = {"denoiser": _sd3_keys.read_sd3_transformer(source)}
        for part in cls.text_parts:
            encoder = _sd3_text.read_encoder(part, source, model)
            if encoder:
                networks[part] = encoder
        return networks

    @classmethod
    def name_base_model(cls, denoiser: Network) -> str:
        return _sd3_keys.get_version(denoiser.config)

    @classmethod
    def load_tokenizers(cls, blueprint: Blueprint, model: ModelOptions) -> dict[str, Any]:
        return _sd3_text.load_sd3_tokenizers(blueprint, model)

    @classmethod
    def builders(cls, blueprint: Blueprint) -> Mapping[str, Builder]:
        networks = blueprint.networks
        clips = {name: _sd3_text.choose_builder(networks[name]) for name in blueprint.text_parts if name != "t5"}
        return {"denoiser": _sd3_keys.build, "t5": _t5.build, **clips}

    @classmethod
    def choose_dtype(cls, part: str, dtype: torch.dtype, model: ModelOptions) -> torch.dtype:
        if part == "t5" and model.t5xxl_dtype is not None:
            return _T5_DTYPES[model.t5xxl_dtype]
        return super().choose_dtype(part, dtype, model)

    def choose_place(self, part: str) -> Place:
        place, device = super().choose_place(part), self.model_options.t5xxl_device
        return place._replace(device=_sd3_text.find_t5_device(device)) if part == "t5" and device else place

    def finish_denoiser(self, denoiser: nn.Module) -> None:
        patch_embed: Any = denoiser.pos_embed
        patch_embed.crop_rate = self.model_options.pos_emb_random_crop_rate
        patch_embed.add_scaled_tables(self.scaled_sides)

    @classmethod
    def adapter_specs(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        denoiser = _sd3_keys.spec(DENOISER_PREFIX, _sd3_keys.count_adapter_blocks(shapes))
        encoders = {part: _sd3_text.make_spec(part, projected=False) for part in cls.text_parts}
        return {"denoiser": denoiser, **encoders}

    def set_resolutions(self, resolutions: Iterable[tuple[int, int]]) -> None:
        if self.model_options.enable_scaled_pos_embed:
            self.scaled_sides = {count_side_patches(width, height) for width, height in resolutions}
            if self.parts["denoiser"].is_loaded:
                self.finish_denoiser(self.denoiser)

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder, tokenizer, masked = self.parts[part], self.tokenizers[part], self.masked[part]
        if part == "t5":
            return _t5.encode_t5(encoder, tokenizer, captions, self.t5_length, masked=masked)
        return _sd3_text.encode_clip(encoder, tokenizer, captions, masked=masked)

    def apply_prompt_weights(self, part: str, features: Tensors, pieces: WeightedText) -> Tensors:
        tokenizer, mode = self.tokenizers[part], self.model_options.emb_normalize_mode
        if part == "t5":
            return _t5.apply_prompt_weights(tokenizer, features, pieces)
        return _clip.apply_prompt_weights(tokenizer, features, pieces, mode=mode)

    def token_budget(self, part: str, captions: Sequence[str]) -> TokenBudget:
        limit = self.t5_length - 1 if part == "t5" else _clip.CHUNK_LENGTH
        return TokenBudget(_sd3_text.count_caption_tokens(self.tokenizers[part], captions), limit)

    def text_fingerprint(self, part: str) -> str:
        masked = f"masked {self.masked[part]}"
        if part == "t5":
            return f"{self.t5_length} tokens, {masked}"
        mode = self.model_options.emb_normalize_mode
        clip = _clip.fingerprint_clip(self.tokenizers[part], layer=_clip.PENULTIMATE, chunks=1, mode=mode)
        return f"{clip}, pooled, {masked}"

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        moved: dict[str, Tensors] = {}
        for part, tensors in features.items():
            moved[part] = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        clip = [_sd3_text.pad_features(moved[part], _clip.CLIP_LENGTH) for part in _CLIPS]
        if "t5" in moved:
            t5 = _sd3_text.pad_features(moved["t5"], self.t5_length)
        else:  # zeros, as many as CLIP has tokens
            t5 = clip[0].new_zeros(len(clip[0]), _clip.CLIP_LENGTH, self.text_width)
        return {
            "encoder_hidden_states": _sd3_text.join_features(clip, t5),
            "pooled_projections": torch.cat([moved[part]["pooled"] for part in _CLIPS], dim=-1),
        }

    def make_inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        text = {name: tensor.to(noisy.dtype) for name, tensor in conditioning.items()}
        return {"hidden_states": noisy, "timestep": t.to(noisy.device, non_blocking=True), **text}


def make_sd3_grid(shift: float) -> TimestepGrid:
    """Even steps from pure noise to the smallest sigma of the shifted table of 1000, then shifted once more."""

    def make_sigmas(steps: int, tokens: int) -> list[float]:
        even = torch.linspace(1.0, shift_sigma(0.001, shift), steps, dtype=torch.float64).tolist()
        return [shift_sigma(sigma, shift) for sigma in even]

    return make_time_grid(make_sigmas)


def count_side_patches(width: int, height: int) -> int:
    """Side in patches of the square image with as many pixels."""
    return round((width * height) ** 0.5) // 8 // 2


def _make_metadata(model: ModelOptions, noise: NoiseOptions) -> dict[str, Any]:
    values = {name: vars(model)[name] for name in ("apply_lg_attn_mask", "apply_t5_attn_mask")}
    values |= {name: vars(noise)[name] for name in ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")}
    return {f"ss_{name}": value for name, value in values.items()}


def _note_unused_options(networks: Mapping[str, Network], model: ModelOptions, noise: NoiseOptions) -> Iterator[str]:
    if "t5" not in networks:
        for name in ("t5xxl_max_token_length", "t5xxl_device", "t5xxl_dtype", "apply_t5_attn_mask"):
            if vars(model)[name] not in (None, False, _T5_LENGTH):
                yield f"--{name} has no effect without T5-XXL (--t5xxl FILE)"
    if noise.timestep_sampling is None:
        no_effect = "has no effect without --timestep_sampling"
        if noise.discrete_flow_shift is not None:
            yield f"--discrete_flow_shift {no_effect}; --training_shift shifts this model's default density"
        if noise.sigmoid_scale != 1:
            yield f"--sigmoid_scale {no_effect}"
    elif noise.training_shift != 1:
        yield "--training_shift has no effect with --timestep_sampling"


def _note_position_options(version: str, model: ModelOptions) -> Iterator[str]:
    for name in ("pos_emb_random_crop_rate", "enable_scaled_pos_embed"):
        if vars(model)[name] and version != "5-medium":
            yield f"--{name} is for Stable Diffusion 3.5 medium; this model only knows the middle of its position table"
