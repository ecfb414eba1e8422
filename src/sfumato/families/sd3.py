"""Stable Diffusion 3 and 3.5: CLIP-L, CLIP-G and T5-XXL, a transformer in which text and picture attend together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import Pieces
from sfumato.diffusion.objective import Grid, RectifiedFlow
from sfumato.errors import Problems, UserError
from sfumato.families import _clip, _sd3_keys, _sd3_text, _t5, _tokenizers, _vae
from sfumato.families._file_kinds import LATENT, check_width
from sfumato.families.base import FAMILIES, Blueprint, Component, Family, Network, Part, PartSpec, Room, Sampling
from sfumato.families.source import Source, Weights
from sfumato.formats.keymap import identity

PREFIX = "model.diffusion_model."
CLIPS = ("clip_l", "clip_g")
COMPONENTS = {"denoiser": Component(folder="transformer"), **_sd3_text.COMPONENTS}
T5_LENGTH = 256
VAE_FACTS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
SHIFT = 3.0  # of the time grid in sampling
TITLES = {"medium": "3 medium", "5-medium": "3.5 medium", "5-large": "3.5 large"}
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@FAMILIES.register("sd3")
class StableDiffusion3(Family):
    name = "sd3"
    text_parts = ("clip_l", "clip_g", "t5")
    bucket_step = 32
    options = frozenset(
        {"vae", "no_half_vae", "clip_l", "clip_g", "t5xxl", "t5xxl_max_token_length", "t5xxl_device", "t5xxl_dtype"}
        | {"apply_lg_attn_mask", "apply_t5_attn_mask", "clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"}
        | {"pos_emb_random_crop_rate", "enable_scaled_pos_embed", "weighted_captions", "prompt_weighting"}
        | {"weighting_scheme", "logit_mean", "logit_std", "mode_scale", "training_shift"}
        | {"timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type"}
    )
    sampling = Sampling(width=512, height=512, steps=30, scale=7.5, guidance=None, size_multiple=16)
    components = COMPONENTS

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module, model: ModelOptions) -> None:
        super().__init__(blueprint, parts, vae)
        self.masked = {"clip_l": model.apply_lg_attn_mask, "clip_g": model.apply_lg_attn_mask}
        self.masked["t5"] = model.apply_t5_attn_mask
        self.t5_length = model.t5xxl_max_token_length or T5_LENGTH
        self.text_width = blueprint.networks["denoiser"].config["joint_attention_dim"]
        self.scaled_places = model.enable_scaled_pos_embed
        patches: Any = self.denoiser.pos_embed
        patches.crop_rate = model.pos_emb_random_crop_rate
        folders = _clip.tokenizer_folders(blueprint.source, model, ("tokenizer", "tokenizer_2", "tokenizer_3"))
        self.tokenizers: dict[str, Any] = {
            "clip_l": _tokenizers.clip_tokenizer(folders[0]),
            "clip_g": _tokenizers.clip_tokenizer(folders[1], pad_with_zero=True),
        }
        for name, tokenizer in self.tokenizers.items():
            _clip.check_vocabulary(tokenizer, self.parts[name].module)
        if "t5" in self.text_parts:
            self.tokenizers["t5"] = _tokenizers.t5_tokenizer(folders[2] or _tokenizers.t5_in_hub_cache())

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            return source.has("transformer") and source.config("transformer")["_class_name"] == "SD3Transformer2DModel"
        keys = {key.removeprefix(PREFIX) for key in source.shapes}
        original = {"joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight", "pos_embed"}
        return original <= keys or {"transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.pos_embed"} <= keys

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        denoiser = _read_transformer(source)
        networks = {"denoiser": denoiser, **_read_others(source, model, denoiser)}
        kind = _sd3_keys.kind_of(denoiser.config)
        return Blueprint(
            source=source,
            title=f"Stable Diffusion {TITLES[kind]}" + ("" if "t5" in networks else ", without T5-XXL"),
            base_model_version=kind,
            architecture=f"stable-diffusion-3-{kind}",
            text_parts=tuple(part for part in cls.text_parts if part in networks),
            networks=networks,
            objective=RectifiedFlow(
                space=noise.model_prediction_type or "sigma_scaled",
                grid=time_grid(SHIFT),
                grid_at=time_grid,
                usual_sampling="whole_steps",
            ),
            latents=_vae.latent_spec(networks["vae"].config, patch=2, size_multiple=16),
            checkpoint=("denoiser", "vae"),
            metadata=_metadata(model, noise),
            notes=(*_notes(networks, model, noise), *_place_notes(kind, model)),
        )

    @classmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        networks = blueprint.networks
        builders = {name: _sd3_text.builder(networks[name]) for name in blueprint.text_parts if name != "t5"}
        parts = blueprint.load({"denoiser": _sd3_keys.build, **builders}, dtype=dtype, device=device)
        if "t5" in blueprint.text_parts:
            own = PRECISIONS[model.t5xxl_dtype] if model.t5xxl_dtype else dtype
            place = t5_device(model.t5xxl_device) if model.t5xxl_device else device
            parts |= blueprint.load({"t5": _t5.build}, dtype=own, device=place)
        vae_dtype = _vae.precision(dtype, whole=model.no_half_vae)
        vae = networks["vae"].load(_vae.build, dtype=vae_dtype, device=device)
        return cls(blueprint, parts, vae, model)

    @classmethod
    def adapted(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        denoiser = _sd3_keys.spec(PREFIX, _sd3_keys.blocks_of_adapter(shapes))
        clips = {name: _sd3_text.clip_spec(name, projected=False) for name in CLIPS}
        return {"denoiser": denoiser, **clips, "t5": _sd3_text.t5_spec()}

    def expect(self, resolutions: Iterable[tuple[int, int]]) -> None:
        if self.scaled_places:
            patches: Any = self.denoiser.pos_embed
            patches.scale_to({patches_of(width, height) for width, height in resolutions})

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder, tokenizer, masked = self.parts[part].module, self.tokenizers[part], self.masked[part]
        if part == "t5":
            return _sd3_text.t5_features(encoder, tokenizer, captions, self.t5_length, masked=masked)
        return _sd3_text.clip_features(encoder, tokenizer, captions, masked=masked)

    def weigh(self, part: str, features: Tensors, pieces: Pieces) -> Tensors:
        hidden = features["hidden"]
        if part == "t5":
            weights = _t5.token_weights(self.tokenizers[part], pieces, len(hidden))
            return {**features, "hidden": hidden * weights.to(hidden)[:, None]}
        weights = _clip.token_weights(self.tokenizers[part], pieces, chunks=1)
        return {**features, "hidden": _clip.weighted(hidden, weights[: len(hidden)])}

    def room(self, part: str, captions: Sequence[str]) -> Room:
        limit = self.t5_length - 1 if part == "t5" else _clip.CHUNK
        return Room(_tokenizers.lengths(self.tokenizers[part], captions), limit)

    def text_fingerprint(self, part: str) -> str:
        masked = f"masked {self.masked[part]}"
        if part == "t5":
            return f"{self.t5_length} tokens, {masked}"
        return f"{_clip.fingerprint(self.tokenizers[part], layer=_sd3_text.LAYER, chunks=1)}, pooled, {masked}"

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        here = {part: {name: x.to(self.device) for name, x in found.items()} for part, found in features.items()}
        clip = [_sd3_text.filled(here[part], _clip.LENGTH) for part in CLIPS]
        if "t5" in here:
            t5 = _sd3_text.filled(here["t5"], self.t5_length)
        else:  # as many zeros as CLIP has tokens
            t5 = clip[0].new_zeros(len(clip[0]), _clip.LENGTH, self.text_width)
        return {
            "encoder_hidden_states": _sd3_text.joined(clip, t5),
            "pooled_projections": torch.cat([here[part]["pooled"] for part in CLIPS], dim=-1),
        }

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae.encode(self.vae, self.latents, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return _vae.decode(self.vae, self.latents, latents)

    def inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        text = {name: tensor.to(noisy.dtype) for name, tensor in conditioning.items()}
        return {"hidden_states": noisy, "timestep": t.to(noisy.device), **text}

    def output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return raw


def time_grid(shift: float) -> Grid:
    """Even steps from pure noise to the least level of the shifted table of 1000, then shifted once more."""

    def set_timesteps(scheduler: Any, steps: int, tokens: int) -> None:
        even = torch.linspace(1.0, shifted(0.001, shift), steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=[shifted(sigma, shift) for sigma in even])

    return set_timesteps


def shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def patches_of(width: int, height: int) -> int:
    """Side in patches of the square picture that is as large as one of these pixels."""
    return round((width * height) ** 0.5) // 8 // 2


def t5_device(name: str) -> torch.device:
    """Raises UserError for a name that is no device, and for a device that is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise UserError(f"--t5xxl_device {name}: there is no such device here", fix="cpu, or cuda:0") from error


def _read_transformer(source: Source) -> Network:
    if source.is_folder:
        config = _sd3_keys.config_of_folder(source.config("transformer"))
        weights = Weights(file=source.weights("transformer"), key_map=identity())
        return Network(spec=_sd3_keys.spec(PREFIX, config["num_layers"]), config=config, weights=weights)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in source.shapes) else ""
    blocks = _sd3_keys.block_count(source.shapes, prefix + "joint_blocks.")
    if blocks:
        weights = Weights(file=source.file, key_map=_sd3_keys.key_map(blocks), prefix=prefix)
    else:  # a file in diffusers' names, taken out of its folder
        blocks = _sd3_keys.block_count(source.shapes, prefix + "transformer_blocks.")
        weights = Weights(file=source.file, key_map=identity(), prefix=prefix)
    config = _sd3_keys.config_from_shapes(weights.shapes())
    return Network(spec=_sd3_keys.spec(prefix, blocks), config=config, weights=weights)


def _read_others(source: Source, model: ModelOptions, denoiser: Network) -> dict[str, Network]:
    """Text encoders and autoencoder; all that are missing are told at once. T5 may be: it was often left out in
    training, too, with zeros in its place.
    """
    problems = Problems()
    found: dict[str, Network] = {}
    for part in (*CLIPS, "t5"):
        with problems.catch():
            network = _sd3_text.read(part, source, model)
            if network is None and part in CLIPS:
                raise _sd3_text.missing(part, source)
            found |= {part: network} if network else {}
    with problems.catch():
        replaced = _vae.replacement(model.vae, VAE_FACTS) if model.vae else None
        found["vae"] = replaced or _vae.network(source, _vae.PREFIX, VAE_FACTS)
    problems.raise_all()
    _sd3_text.check(denoiser, found)
    channels = found["vae"].config["latent_channels"]
    check_width("vae", found["vae"].weights.file.header.path, LATENT, channels, denoiser.config["in_channels"])
    return found


def _metadata(model: ModelOptions, noise: NoiseOptions) -> dict[str, Any]:
    values = {name: vars(model)[name] for name in ("apply_lg_attn_mask", "apply_t5_attn_mask")}
    values |= {name: vars(noise)[name] for name in ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")}
    return {f"ss_{name}": value for name, value in values.items()}


def _notes(networks: Mapping[str, Network], model: ModelOptions, noise: NoiseOptions) -> Iterator[str]:
    if "t5" not in networks:
        for name in ("t5xxl_max_token_length", "t5xxl_device", "t5xxl_dtype", "apply_t5_attn_mask"):
            if vars(model)[name] not in (None, False, T5_LENGTH):
                yield f"--{name} has no effect without T5-XXL; --t5xxl FILE gives one"
    if noise.timestep_sampling is None:
        start = "has no effect without --timestep_sampling"
        if noise.discrete_flow_shift is not None:
            yield f"--discrete_flow_shift {start}; --training_shift is the shift of this model's own density"
        if noise.sigmoid_scale != 1:
            yield f"--sigmoid_scale {start}"
    elif noise.training_shift != 1:
        yield "--training_shift has no effect with --timestep_sampling"


def _place_notes(kind: str, model: ModelOptions) -> Iterator[str]:
    for name in ("pos_emb_random_crop_rate", "enable_scaled_pos_embed"):
        if vars(model)[name] and kind != "5-medium":
            yield f"--{name} is meant for Stable Diffusion 3.5 medium; this model knows the middle of its table alone"
