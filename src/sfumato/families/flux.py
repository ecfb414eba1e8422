"""FLUX.1 dev and schnell: CLIP-L for the pooled vector, T5-XXL for the words, a transformer over packed latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.emphasis import Pieces
from sfumato.diffusion.objective import RectifiedFlow
from sfumato.diffusion.timesteps import resolution_mu
from sfumato.errors import UserError
from sfumato.families import _clip, _flux_keys, _t5, _tokenizers, _vae
from sfumato.families._source import Source, Weights
from sfumato.families.base import FAMILIES, Blueprint, Family, Network, Part, PartSpec, Sampling
from sfumato.formats.keymap import KeyMap, Rule

PREFIX = "model.diffusion_model."
T5_LENGTH = {True: 512, False: 256}  # with embedded guidance (dev), without (schnell)
DEFAULT_GUIDANCE = 3.5


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


def t5_spec() -> PartSpec:
    return PartSpec(
        name="t5",
        key_map=_t5.key_map(),
        key_prefix="",
        adapter_map=_t5.key_map(),
        adapter_prefix="lora_te3",
        targets=_t5.TARGETS,
        blocks=_t5.BLOCKS,
        opt_in="train_t5xxl",
    )


@FAMILIES.register("flux")
class Flux(Family):
    name = "flux"
    text_parts = ("clip_l", "t5")
    bucket_step = 32
    options = frozenset(
        {"clip_l", "t5xxl", "ae", "model_type", "t5xxl_max_token_length", "apply_t5_attn_mask", "guidance_scale"}
        | {"timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type"}
        | {"weighting_scheme", "logit_mean", "logit_std", "mode_scale"}
        | {"weighted_captions", "prompt_weighting"}
    )
    sampling = Sampling(width=512, height=512, steps=20, scale=1.0, guidance=DEFAULT_GUIDANCE, size_multiple=16)

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module, model: ModelOptions) -> None:
        super().__init__(blueprint, parts, vae)
        self.guided = bool(blueprint.networks["denoiser"].config["guidance_embeds"])
        self.masked = model.apply_t5_attn_mask
        self.t5_length = model.t5xxl_max_token_length or T5_LENGTH[self.guided]
        clip_folder, t5_folder = _tokenizer_folders(blueprint.source, model)
        self.clip_tokenizer: Any = _tokenizers.clip_tokenizer(clip_folder)
        self.t5_tokenizer: Any = _tokenizers.t5_tokenizer(t5_folder)
        _clip.check_vocabulary(self.clip_tokenizer, self.parts["clip_l"].module)

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            return source.has("transformer") and source.config("transformer")["_class_name"] == "FluxTransformer2DModel"
        keys = {key.removeprefix(PREFIX) for key in source.shapes}
        return "double_blocks.0.img_attn.qkv.weight" in keys and "vector_in.in_layer.weight" in keys

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        fixed = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        denoiser = _read_transformer(source)
        vae = _vae.replacement(_component(source, model, "ae", "vae"), fixed)
        guided = bool(denoiser.config["guidance_embeds"])
        return Blueprint(
            source=source,
            title="FLUX.1 dev" if guided else "FLUX.1 schnell",
            base_model_version="flux1",
            architecture="flux-1-dev" if guided else "flux-1-schnell",
            text_parts=cls.text_parts,
            networks={
                "denoiser": denoiser,
                "clip_l": _read_clip(_component(source, model, "clip_l", "text_encoder")),
                "t5": _read_t5(_component(source, model, "t5xxl", "text_encoder_2")),
                "vae": vae,
            },
            objective=RectifiedFlow(space=noise.model_prediction_type or "sigma_scaled", grid=time_grid(guided)),
            latents=_vae.latent_spec(vae.config, patch=2, size_multiple=16),
        )

    @classmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        builders = {
            "denoiser": _flux_keys.build,
            "clip_l": _clip.build,
            "t5": _t5.build,
        }
        parts = blueprint.load(builders, dtype=dtype, device=device)
        vae = blueprint.networks["vae"].load(_vae.build, dtype=_vae.precision(dtype), device=device)
        return cls(blueprint, parts, vae, model)

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

    def text_fingerprint(self, part: str) -> str:
        return f"{self.t5_length} tokens, masked {self.masked}" if part == "t5" else f"{_clip.LENGTH} tokens, pooled"

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        conditioning = {
            "pooled_projections": features["clip_l"]["pooled"],
            "encoder_hidden_states": features["t5"]["hidden"],
        }
        if "mask" in features["t5"]:
            conditioning["attention_mask"] = features["t5"]["mask"]
        if self.guided:
            batch = len(features["clip_l"]["pooled"])
            strength = DEFAULT_GUIDANCE if guidance is None else guidance
            conditioning["guidance"] = torch.full((batch,), strength, device=self.device)
        return conditioning

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae.encode(self.vae, self.latents, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return _vae.decode(self.vae, self.latents, latents)

    def inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        """The image goes in as it is, float32 under autocast: the network casts the timestep to its dtype."""
        text = conditioning["encoder_hidden_states"]
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        arguments: dict[str, object] = {
            "hidden_states": pack(noisy),
            "timestep": t.to(noisy.device) / 1000,
            "pooled_projections": conditioning["pooled_projections"].to(noisy.dtype),
            "encoder_hidden_states": text.to(noisy.dtype),
            "img_ids": image_ids(height, width, noisy),
            "txt_ids": noisy.new_zeros(text.shape[1], 3),
        }
        if "guidance" in conditioning:
            arguments["guidance"] = conditioning["guidance"].to(noisy.dtype)
        if "attention_mask" in conditioning:
            mask = conditioning["attention_mask"]
            whole = torch.cat([mask, mask.new_ones(len(mask), height * width)], dim=1)
            arguments["joint_attention_kwargs"] = {"attention_mask": whole[:, None, None, :]}
        return arguments

    def output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return unpack(raw, noisy.shape)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): one token for each 2x2 patch."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`."""
    batch, channels, height, width = shape
    patches = tokens.view(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 3) positions (0, y, x)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).to(like)


def time_grid(guided: bool) -> Callable[[Any, int, int], None]:
    """dev moves its grid towards noise by the number of tokens; schnell keeps it even."""

    def set_timesteps(scheduler: Any, steps: int, tokens: int) -> None:
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        if guided:
            shift = math.exp(resolution_mu(tokens))
            sigmas = [shift / (shift + 1 / sigma - 1) for sigma in sigmas]
        scheduler.set_timesteps(sigmas=sigmas)

    return set_timesteps


def _read_transformer(source: Source) -> Network:
    if source.is_folder:
        config = _flux_keys.config_of_folder(source.config("transformer"))
        return Network(
            spec=_flux_keys.spec(""),
            config=config,
            weights=Weights(file=source.weights("transformer"), key_map=KeyMap([Rule("{*}", ("{*}",))])),
        )
    prefix = PREFIX if any(key.startswith(PREFIX) for key in source.shapes) else ""
    inside = {key[len(prefix) :]: shape for key, shape in source.shapes.items() if key.startswith(prefix)}
    config = _flux_keys.config_from_shapes(inside)
    weights = Weights(file=source.file, key_map=_flux_keys.KEYS, prefix=prefix, rows=_flux_keys.rows)
    return Network(spec=_flux_keys.spec(prefix), config=config, weights=weights)


def _read_clip(path: Path) -> Network:
    source = Source(path)
    weights = Weights(file=source.component(), key_map=_clip.FILE_KEYS)
    if source.is_folder:
        config = _clip.config_of_folder(source.config("."))
    else:
        config = _clip.config_from_shapes(weights.shapes())
    return Network(spec=clip_spec(), config=config, weights=weights)


def _read_t5(path: Path) -> Network:
    source = Source(path)
    weights = Weights(file=source.component(), key_map=_t5.key_map(), tied=_t5.TIED)
    config = _t5.config_of_folder(source.config(".")) if source.is_folder else _t5.config_from_shapes(weights.shapes())
    return Network(spec=t5_spec(), config=config, weights=weights)


def _component(source: Source, model: ModelOptions, option: str, folder: str) -> Path:
    """What the option names, else the folder inside a diffusers model."""
    given = {"clip_l": model.clip_l, "t5xxl": model.t5xxl, "ae": model.ae}[option]
    if given:
        return Path(given)
    if source.has(folder):
        return source.path / folder
    raise UserError(f"--{option} is missing: {source.path} holds the transformer alone", fix=f"--{option} FILE")


def _tokenizer_folders(source: Source, model: ModelOptions) -> tuple[Path | None, Path | None]:
    """--tokenizer's two values, else the folders beside the checkpoint or in the diffusers model, else the cache."""
    beside = source.path if source.is_folder else source.path.parent
    found = [folder if folder.is_dir() else None for folder in (beside / "tokenizer", beside / "tokenizer_2")]
    given = [Path(folder) for folder in model.tokenizer[:2]]
    clip, t5 = [*given, *found[len(given) :]]
    return clip, t5 or _tokenizers.t5_in_hub_cache()
