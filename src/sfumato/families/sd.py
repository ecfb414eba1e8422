"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet over 4-channel latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Images, Sizes, Tensors
from sfumato.data.prompt_weighting import WeightedText
from sfumato.families import _clip, _open_clip, _tokenizers, _unet, _vae
from sfumato.families._file_kinds import make_missing_text_error
from sfumato.families._unet_control_net import UNET_CONTROL_NET, list_unet_layers
from sfumato.families.base import FAMILIES, Family, TokenBudget
from sfumato.families.blueprint import STABILITY_AI, Blueprint, Component, Sampling
from sfumato.families.part import DENOISER_PREFIX, Builder, Network, PartSpec
from sfumato.families.source import Source
from sfumato.formats.keymap import KeyMap, make_identity_map

CLIP_PREFIX = "cond_stage_model.transformer."  # 1.x: OpenAI's CLIP-L
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # 2.x: OpenCLIP's ViT-H
_OPEN_CLIP_ACTIVATION = "gelu"
_OPEN_CLIP_LAYERS = 24  # in files; the model was trained without the last
_PIPELINE = _unet.make_pipeline(
    "StableDiffusionPipeline",
    {"clip": Component(folder="text_encoder", key_map=_clip.key_map())},
    tokenizers=("tokenizer",),
    absent=("safety_checker", "feature_extractor", "image_encoder"),
    options={"requires_safety_checker": False},
)
_PUBLISHED_CONFIG = {  # of every published model; the original names of the UNet's blocks depend on it
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}
_CLIP_NAMES = (  # before its layers in adapter files of other programs
    "lora_te1",
    *_clip.CLIP_L_NAMES,
    "clip_h",
    "clip_h.transformer",
    "text_encoders.clip_h.transformer",
)
_LR_BLOCKS = _unet.LrBlocks(  # 25: twelve down, the middle, twelve up
    patterns=(
        *(f"input_blocks.{i}.{{*}}" for i in range(12)),
        "middle_block.{*}",
        *(f"output_blocks.{i}.{{*}}" for i in range(12)),
    ),
    ranges={"down_lr_weight": range(12), "mid_lr_weight": range(12, 13), "up_lr_weight": range(13, 25)},
)


def _unet_spec(key_map: KeyMap) -> PartSpec:
    """Adapter files of this family have diffusers' names."""
    return _unet.spec(key_map, make_identity_map(), _LR_BLOCKS)


def _clip_spec(prefix: str = CLIP_PREFIX, file_map: KeyMap | None = None) -> PartSpec:
    return _clip.spec("clip", prefix, "lora_te", file_map, names=_CLIP_NAMES, embedding_name="emb_params")


@FAMILIES.register("sd")
class StableDiffusion(Family):
    name = "sd"
    text_parts = ("clip",)
    bucket_step = 64
    options = frozenset(
        {"vae", "no_half_vae", "clip_skip", "max_token_length", "v2", "v_parameterization", "zero_terminal_snr"}
        | {"weighted_captions", "prompt_weighting", "sample_sampler", "emb_normalize_mode"}
        | _unet.LOSS_OPTIONS
    )
    has_deep_shrink = True
    couples_parts = True
    sampling = Sampling(width=512, height=512, steps=30, scale=7.5, guidance=None, size_multiple=8)
    components = _PIPELINE.networks
    control_net = UNET_CONTROL_NET
    list_controlled_layers = staticmethod(list_unet_layers)

    def __init__(self, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(blueprint, model, dtype=dtype, device=device)
        self.clip_layer = model.clip_skip or 1
        self.chunks = _clip.count_chunks(model)

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            return source.has_network("unet") and not source.read_config("unet").get("addition_embed_type")
        has_unet = DENOISER_PREFIX + "input_blocks.0.0.weight" in source.shapes
        return has_unet and DENOISER_PREFIX + _unet.SIZE_EMBEDDER not in source.shapes

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        has_own = source.has_network("text_encoder") or source.find_prefix(CLIP_PREFIX, OPEN_CLIP_PREFIX)
        text = source if has_own else source.find_cached("clip")
        if text is None:
            raise make_missing_text_error(source.name, ["CLIP"])
        second = is_version_2(text)
        if model.v2 and not second:
            raise _unet.make_v2_error(source, "Stable Diffusion 1.x")
        vae = _vae.find_vae(source, model, {"scaling_factor": 0.18215})
        denoiser = _unet.read_unet(source, _unet_spec, _unet.count_heads if second else _set_eight_heads)
        inpaints = _unet.check_channels(source, denoiser, vae)
        clip = _read_clip(text)
        _clip.check_clip_skip(model, clip.config)
        objective, notes, declared = _unet.read_objective(source, model, noise)
        v = objective.predicts == "v"
        return Blueprint(
            source=source,
            title=f"Stable Diffusion {2 if second else 1}.x"
            + (", predicting v" if v else "")
            + (", for inpainting" if inpaints else ""),
            base_model_version=cls.name_base_model(denoiser) + ("_v" if v else ""),
            architecture=f"stable-diffusion-v2-{'768-v' if v else '512'}" if second else "stable-diffusion-v1",
            checkpoint_implementation=STABILITY_AI,
            text_parts=cls.text_parts,
            checkpoint=("denoiser", "clip", "vae"),
            inpaints=inpaints,
            pipeline=_unet.choose_pipeline(_PIPELINE, inpaints=inpaints),
            networks={"denoiser": denoiser, "clip": clip, "vae": vae},
            objective=objective,
            latents=_vae.make_latent_spec(vae.config, patch=1, size_multiple=64),
            metadata={"ss_v2": second},
            notes=notes,
            declared=declared,
        )

    @classmethod
    def name_base_model(cls, denoiser: Network) -> str:
        """Without what it predicts; from version 2 on, the projections before and after attention are linear layers."""
        return f"sd_v{2 if denoiser.config.get('use_linear_projection') else 1}"

    @classmethod
    def load_tokenizers(cls, blueprint: Blueprint, model: ModelOptions) -> dict[str, Any]:
        source = blueprint.source
        folder = _clip.find_tokenizer_folders(blueprint, model, {"clip": "tokenizer"})["clip"]
        merges = None if source.is_folder else source.read_config("tokenizer").get("merges")
        config = blueprint.networks["clip"].config
        pad_with_zero = config.get("hidden_act") == _OPEN_CLIP_ACTIVATION
        tokenizer = _tokenizers.load_clip_tokenizer(folder, pad_with_zero=pad_with_zero, merges=merges)
        _clip.check_vocabulary(tokenizer, config)
        return {"clip": tokenizer}

    @classmethod
    def builders(cls, blueprint: Blueprint) -> Mapping[str, Builder]:
        return {"denoiser": _unet.build, "clip": _clip.build}

    def unread_layers(self, part: str) -> Sequence[str]:
        config = self.blueprint.networks[part].config
        return _clip.list_unread_layers(config, self.clip_layer) if part == "clip" else ()

    @classmethod
    def adapter_specs(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        return {"denoiser": _unet_spec(_unet.guess_key_map(_PUBLISHED_CONFIG, shapes)), "clip": _clip_spec()}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder = self.parts[part]
        ids = _clip.tokenize(self.tokenizers["clip"], captions, encoder.device, chunks=self.chunks)
        hidden = _clip.encode_tokens(encoder.module, ids, layer=self.clip_layer)
        return [{"hidden": row} for row in _clip.join_chunks(hidden, self.chunks)]

    def apply_prompt_weights(self, part: str, features: Tensors, pieces: WeightedText) -> Tensors:
        return _clip.apply_prompt_weights(
            self.tokenizers["clip"], features, pieces, chunks=self.chunks, mode=self.model_options.emb_normalize_mode
        )

    def token_budget(self, part: str, captions: Sequence[str]) -> TokenBudget:
        return TokenBudget(
            _tokenizers.count_tokens(self.tokenizers["clip"], captions), _clip.CHUNK_LENGTH * self.chunks
        )

    def text_fingerprint(self, part: str) -> str:
        return _clip.fingerprint_clip(
            self.tokenizers["clip"],
            layer=self.clip_layer,
            chunks=self.chunks,
            mode=self.model_options.emb_normalize_mode,
        )

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        return {"encoder_hidden_states": features["clip"]["hidden"]}

    def add_images(self, arguments: dict[str, object], noisy: Tensor, images: Images) -> dict[str, object]:
        return _unet.add_inpaint_channels(arguments, images) if self.blueprint.inpaints else arguments

    def make_inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        dtype = self.parts["denoiser"].dtype
        text = conditioning["encoder_hidden_states"].to(dtype)
        time = t.to(noisy.device, non_blocking=True)
        return {"sample": noisy.to(dtype), "timestep": time, "encoder_hidden_states": text}


def is_version_2(source: Source) -> bool:
    """Whether the text encoder is OpenCLIP's; in a folder, where the names are the same, by its activation."""
    if not source.is_folder:
        return any(key.startswith(OPEN_CLIP_PREFIX) for key in source.shapes)
    config = source.read_config(source.find_inner("text_encoder"))
    return config.get("hidden_act") == _OPEN_CLIP_ACTIVATION


def _set_eight_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """The number of heads, which diffusers calls attention_head_dim."""
    return {"attention_head_dim": 8}


def _read_clip(source: Source) -> Network:
    if not is_version_2(source):
        return _clip.read_clip(source, "text_encoder", _clip_spec())
    if source.is_folder:
        key_map = _open_clip.key_map(projected=False)
        return _clip.read_clip(source, "text_encoder", _clip_spec(OPEN_CLIP_PREFIX, key_map))
    key_map = _open_clip.key_map(projected=False, unused=_find_unused_layer(source))
    return _open_clip.read_open_clip(source, "text_encoder", _clip_spec(OPEN_CLIP_PREFIX, key_map))


def _find_unused_layer(source: Source) -> int | None:
    """The index of the last layer, which the model was trained without; None in a file made from a folder."""
    layers = _open_clip.count_layers(list(source.shapes), OPEN_CLIP_PREFIX)
    return None if layers == _OPEN_CLIP_LAYERS - 1 else layers - 1
