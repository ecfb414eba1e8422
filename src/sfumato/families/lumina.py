"""Lumina-Image 2.0: Gemma 2 for the words, a transformer that reads words and picture as one, FLUX.1's autoencoder.

For the model time runs from noise (0) to picture (1) and its prediction leads to the picture; `inputs` and `output`
turn both round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes, Tensors
from sfumato.data.prompt_weighting import Pieces
from sfumato.diffusion.objective import Grid, RectifiedFlow
from sfumato.diffusion.timesteps import shifted
from sfumato.errors import UserError
from sfumato.families import _gemma2, _gemma2_tokenizer, _lumina_keys, _vae
from sfumato.families._file_kinds import GEMMA2, LATENT, WIDTH, check_width, require, told_of
from sfumato.families._gemma2_tokenizer import GemmaTokenizer
from sfumato.families.base import FAMILIES, Blueprint, Component, Family, Network, Part, PartSpec, Room, Sampling
from sfumato.families.source import Source, Weights, find_path
from sfumato.formats.keymap import KeyMap, Rule

PREFIX = "model.diffusion_model."
TEXT = "text_encoders."  # in files that hold the whole model
TEXT_PREFIX = TEXT + "gemma2_2b.transformer."
VAE_PREFIX = "vae."
VAE_FIXED = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
PROMPT_START = " <Prompt Start> "  # between the system prompt and the caption
USUAL_SAMPLING, USUAL_SHIFT = "shift", 6.0
COMPONENTS = {
    "denoiser": Component(folder="transformer"),
    "gemma2": Component(folder="text_encoder", takes_lora=False),
}


def gemma_spec() -> PartSpec:
    return PartSpec(
        name="gemma2",
        key_map=_gemma2.FILE_KEYS,
        key_prefix=TEXT_PREFIX,
        adapter_map=_gemma2.adapter_map(),
        adapter_prefix="lora_te",
        targets=_gemma2.TARGETS,
        blocks=_gemma2.BLOCKS,
    )


@FAMILIES.register("lumina")
class Lumina(Family):
    name = "lumina"
    text_parts = ("gemma2",)
    bucket_step = 16
    components = COMPONENTS
    options = frozenset(
        {"gemma2", "ae", "no_half_vae", "gemma2_max_token_length", "system_prompt"}
        | {"timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type"}
        | {"weighting_scheme", "logit_mean", "logit_std", "mode_scale"}
        | {"weighted_captions", "prompt_weighting"}
    )
    sampling = Sampling(
        width=1024, height=1024, steps=38, scale=3.5, guidance=None, size_multiple=16, cfg_trunc_ratio=0.25,
        renorm_cfg=1.0,
    )  # fmt: skip

    def __init__(self, blueprint: Blueprint, parts: Mapping[str, Part], vae: nn.Module, model: ModelOptions) -> None:
        super().__init__(blueprint, parts, vae)
        self.length = model.gemma2_max_token_length or _gemma2.LENGTH
        self.preamble = model.system_prompt + PROMPT_START if model.system_prompt else ""
        self.tokenizer = _tokenizer(blueprint, model)
        rows = blueprint.networks["gemma2"].config["vocab_size"]
        if self.tokenizer.size != rows:
            raise UserError(
                f"the tokenizer knows {self.tokenizer.size} tokens, the text encoder {rows}",
                fix="give the folder of Gemma 2's own tokenizer with --tokenizer",
            )

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            kind = "Lumina2Transformer2DModel"
            return source.has("transformer") and source.config("transformer")["_class_name"] == kind
        keys = {key.removeprefix(PREFIX) for key in source.shapes}
        return {"cap_embedder.1.weight", "layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight"} <= keys

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        denoiser = _read_transformer(source)
        _check_length(denoiser, model)
        vae = _read_vae(_component(source, model.ae, "ae", "vae"), denoiser)
        sampling, shift = noise.timestep_sampling or USUAL_SAMPLING, noise.discrete_flow_shift or USUAL_SHIFT
        space = noise.model_prediction_type or "raw"
        return Blueprint(
            source=source,
            title="Lumina-Image 2.0",
            base_model_version="lumina2",
            architecture="lumina-2",
            implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0",
            text_parts=cls.text_parts,
            networks={
                "denoiser": denoiser,
                "gemma2": _read_gemma(_component(source, model.gemma2, "gemma2", "text_encoder"), denoiser),
                "vae": vae,
            },
            objective=RectifiedFlow(
                space=space,
                grid=time_grid(shift),
                grid_at=time_grid,
                usual_sampling=USUAL_SAMPLING,
                usual_shift=USUAL_SHIFT,
            ),
            latents=_vae.latent_spec(vae.config, patch=_lumina_keys.PATCH, size_multiple=16),
            metadata={
                "ss_timestep_sampling": sampling,
                "ss_discrete_flow_shift": shift,
                "ss_model_prediction_type": space,
                "ss_sigmoid_scale": noise.sigmoid_scale,
                "ss_weighting_scheme": noise.weighting_scheme,
                "ss_logit_mean": noise.logit_mean,
                "ss_logit_std": noise.logit_std,
                "ss_mode_scale": noise.mode_scale,
            },
        )

    @classmethod
    def load(cls, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> Self:
        parts = blueprint.load({"denoiser": _lumina_keys.build, "gemma2": _gemma2.build}, dtype=dtype, device=device)
        vae_dtype = _vae.precision(dtype, whole=model.no_half_vae)
        vae = blueprint.networks["vae"].load(_vae.build, dtype=vae_dtype, device=device)
        return cls(blueprint, parts, vae, model)

    @classmethod
    def adapted(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        return {"denoiser": _lumina_keys.spec(""), "gemma2": gemma_spec()}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder: Any = self.parts[part].module
        ids, mask = _gemma2.token_ids(self.tokenizer, captions, self.length, encoder.device)
        hidden = _gemma2.hidden_states(encoder, ids, mask)
        lengths = mask.sum(1).tolist()
        return [{"hidden": one[:n], "mask": real[:n]} for one, real, n in zip(hidden, mask, lengths, strict=True)]

    def weigh(self, part: str, features: Tensors, pieces: Pieces) -> Tensors:
        weights = _gemma2.token_weights(self.tokenizer, pieces, self.length)
        return {**features, "hidden": features["hidden"] * weights.to(features["hidden"])[:, None]}

    def room(self, part: str, captions: Sequence[str]) -> Room:
        before = len(self.tokenizer.tokens(self.preamble))
        return Room([len(self.tokenizer.tokens(caption)) for caption in captions], self.length - 1 - before)

    def text_fingerprint(self, part: str) -> str:
        return f"{self.length} tokens after {self.preamble!r}"

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        text = features["gemma2"]
        return {"encoder_hidden_states": text["hidden"], "encoder_attention_mask": text["mask"]}

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae.encode(self.vae, self.latents, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return _vae.decode(self.vae, self.latents, latents)

    def inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        return {
            "hidden_states": noisy,
            "timestep": 1 - t.to(noisy.device) / 1000,
            "encoder_hidden_states": conditioning["encoder_hidden_states"].to(noisy.dtype),
            "encoder_attention_mask": conditioning["encoder_attention_mask"],
        }

    def output(self, raw: Tensor, noisy: Tensor) -> Tensor:
        return -raw


def time_grid(shift: float) -> Grid:
    """Even steps, moved towards noise by `shift` whatever the picture's size."""

    def set_timesteps(scheduler: Any, steps: int, tokens: int) -> None:
        scheduler.set_timesteps(sigmas=shifted(torch.linspace(1, 1 / steps, steps), shift).tolist())

    return set_timesteps


def _check_length(denoiser: Network, model: ModelOptions) -> None:
    """The last place for a word is where the picture stands."""
    places = (denoiser.config.get("axes_lens") or (300,))[0]
    if (model.gemma2_max_token_length or 0) >= places:
        raise UserError(
            f"--gemma2_max_token_length {model.gemma2_max_token_length}: the model has places for {places - 1} tokens",
            fix=f"at most {places - 1}; {_gemma2.LENGTH} is usual",
        )


def _read_transformer(source: Source) -> Network:
    if source.is_folder:
        return Network(
            spec=_lumina_keys.spec(""),
            config=_lumina_keys.config_of_folder(source.config("transformer")),
            weights=Weights(file=source.weights("transformer"), key_map=KeyMap([Rule("{*}", ("{*}",))])),
        )
    prefix = PREFIX if any(key.startswith(PREFIX) for key in source.shapes) else ""
    inside = {key[len(prefix) :]: shape for key, shape in source.shapes.items() if key.startswith(prefix)}
    weights = Weights(file=source.file, key_map=_lumina_keys.KEYS, prefix=prefix, rows=_lumina_keys.rows)
    return Network(spec=_lumina_keys.spec(prefix), config=_lumina_keys.config_from_shapes(inside), weights=weights)


def _read_gemma(source: Source, denoiser: Network) -> Network:
    """A file of its own, a folder, or a file that holds the whole model."""
    with told_of("gemma2"):
        prefix = TEXT_PREFIX if any(key.startswith(TEXT_PREFIX) for key in source.shapes) else ""
        weights = Weights(file=source.component(), key_map=_gemma2.FILE_KEYS, prefix=prefix)
        shapes = weights.shapes()
        require(GEMMA2, shapes if _gemma2.is_one(shapes) else {}, weights.file.header.tensors, source.path)
        folder = source.is_folder and (source.path / "config.json").is_file()
        config = _gemma2.config_of_folder(source.config(".")) if folder else _gemma2.config_from_shapes(shapes)
    check_width("gemma2", source.path, WIDTH, config["hidden_size"], denoiser.config["cap_feat_dim"])
    return Network(spec=gemma_spec(), config=config, weights=weights, option="gemma2")


def _read_vae(source: Source, denoiser: Network) -> Network:
    with told_of("ae"):
        inside = any(key.startswith(VAE_PREFIX) for key in source.shapes)
    found = _vae.network(source, VAE_PREFIX, VAE_FIXED) if inside else None
    found = found or _vae.replacement(source.path, VAE_FIXED, option="ae")
    channels = found.config["latent_channels"]
    check_width("ae", source.path, LATENT, channels, denoiser.config["in_channels"])
    return found


def _component(source: Source, given: str | None, option: str, folder: str) -> Source:
    """What the option names, else the folder inside a diffusers model, else the checkpoint if it holds everything."""
    if given:
        with told_of(option):
            return Source(find_path(given))
    if source.has(folder):
        return Source(source.path / folder)
    prefix = {"text_encoder": TEXT_PREFIX, "vae": VAE_PREFIX}[folder]
    if any(key.startswith(prefix) for key in source.shapes):
        return source
    raise UserError(f"--{option} is missing: {source.path} holds the transformer alone", fix=f"--{option} FILE")


def _tokenizer(blueprint: Blueprint, model: ModelOptions) -> GemmaTokenizer:
    """--tokenizer, else what lies beside the checkpoint or the text encoder, in its file, or in the hub's cache."""
    if model.tokenizer:
        return _gemma2_tokenizer.from_folder(find_path(model.tokenizer[0]))
    source, weights = blueprint.source, blueprint.networks["gemma2"].weights
    near = [(source.path if source.is_folder else source.path.parent) / "tokenizer"]
    if model.gemma2:
        near += [Path(model.gemma2), Path(model.gemma2).parent / "tokenizer"]
    for folder in near:
        if any((folder / name).is_file() for name in _gemma2_tokenizer.FILES):
            return _gemma2_tokenizer.from_folder(folder)
    for key in (_gemma2.SPIECE, TEXT + _gemma2.SPIECE):
        if key in weights.file.header.tensors:
            return _gemma2_tokenizer.from_bytes(weights.file.read(key), str(weights.file.header.path))
    cached = _gemma2_tokenizer.in_hub_cache()
    if cached is None:
        raise UserError(
            "no Gemma tokenizer was found",
            fix="put tokenizer.json or tokenizer.model of google/gemma-2-2b into a folder and give it with --tokenizer",
        )
    return _gemma2_tokenizer.from_folder(cached)
