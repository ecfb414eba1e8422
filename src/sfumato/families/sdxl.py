"""Stable Diffusion XL: CLIP-L and OpenCLIP's ViT-bigG, a UNet that also takes the image's sizes."""

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
from sfumato.formats.keymap import KeyMap

CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
CLIP_G_PREFIX = "conditioner.embedders.1.model."
CLIP_G_KEYS = _open_clip.key_map(projected=True)
_PIPELINE = _unet.make_pipeline(
    "StableDiffusionXLPipeline",
    {
        "clip_l": Component(folder="text_encoder", key_map=_clip.key_map()),
        "clip_g": Component(folder="text_encoder_2"),
    },
    tokenizers=("tokenizer", "tokenizer_2"),
    absent=("feature_extractor", "image_encoder"),
    options={"force_zeros_for_empty_prompt": True},
)
_LR_BLOCKS = _unet.LrBlocks(  # 23: embeddings, nine down, three in the middle, nine up, the output
    patterns=(
        "time_embed.{*}|label_emb.{*}",
        *(f"input_blocks.{i}.{{*}}" for i in range(9)),
        *(f"middle_block.{i}.{{*}}" for i in range(3)),
        *(f"output_blocks.{i}.{{*}}" for i in range(9)),
        "out.{*}",
    ),
    ranges={"down_lr_weight": range(1, 10), "mid_lr_weight": range(10, 13), "up_lr_weight": range(13, 22)},
)
_PUBLISHED_CONFIG = {  # of every published model; the names of the UNet's blocks depend on it
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # part -> folder
_ENCODER_TITLES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G"}
_ENCODER_PREFIXES = {"clip_l": CLIP_L_PREFIX, "clip_g": CLIP_G_PREFIX}
NUM_SIZES = 6  # original height and width, crop's top and left, target height and width


def _unet_spec(key_map: KeyMap) -> PartSpec:
    """Adapter files have the original names."""
    return _unet.spec(key_map, key_map, _LR_BLOCKS)


def clip_l_spec() -> PartSpec:
    return _clip.spec("clip_l", CLIP_L_PREFIX, "lora_te1", names=_clip.CLIP_L_NAMES)


def clip_g_spec() -> PartSpec:
    return _open_clip.projected_spec("clip_g", CLIP_G_PREFIX, "lora_te2", CLIP_G_KEYS)


@FAMILIES.register("sdxl")
class StableDiffusionXL(Family):
    name = "sdxl"
    text_parts = ("clip_l", "clip_g")
    bucket_step = 32
    options = frozenset(
        {"vae", "no_half_vae", "max_token_length", "v_parameterization", "zero_terminal_snr"}
        | {"weighted_captions", "prompt_weighting", "sample_sampler", "emb_normalize_mode"}
        | _unet.LOSS_OPTIONS
    )
    has_size_inputs = True
    has_deep_shrink = True
    couples_parts = True
    has_pooled_text = True
    sampling = Sampling(width=512, height=512, steps=30, scale=7.5, guidance=None, size_multiple=8)
    components = _PIPELINE.networks
    control_net = UNET_CONTROL_NET
    list_controlled_layers = staticmethod(list_unet_layers)

    def __init__(self, blueprint: Blueprint, model: ModelOptions, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(blueprint, model, dtype=dtype, device=device)
        self.chunks = _clip.count_chunks(model)

    @classmethod
    def detect(cls, source: Source) -> bool:
        if source.is_folder:
            config = source.read_config("unet") if source.has_network("unet") else {}
            return config.get("addition_embed_type") == "text_time" and not config.get("encoder_hid_dim_type")
        return DENOISER_PREFIX + _unet.SIZE_EMBEDDER in source.shapes

    @classmethod
    def read(cls, source: Source, model: ModelOptions, noise: NoiseOptions) -> Blueprint:
        if model.v2:
            raise _unet.make_v2_error(source, "Stable Diffusion XL")
        sources = {part: _find_encoder(source, part, folder) for part, folder in _ENCODERS.items()}
        missing = [part for part, found in sources.items() if found is None]
        if missing:
            raise make_missing_text_error(source.name, [_ENCODER_TITLES[part] for part in missing])
        vae = _vae.find_vae(source, model, {"scaling_factor": 0.13025})
        clip_l = _clip.read_clip(sources["clip_l"] or source, "text_encoder", clip_l_spec())
        clip_g = _open_clip.read_projected(sources["clip_g"] or source, "text_encoder_2", clip_g_spec())
        denoiser = _unet.read_unet(source, _unet_spec, lambda config: _complete_config(config, clip_g))
        inpaints = _unet.check_channels(source, denoiser, vae)
        objective, notes, declared = _unet.read_objective(source, model, noise)
        return Blueprint(
            source=source,
            title="Stable Diffusion XL"
            + (", predicting v" if objective.predicts == "v" else "")
            + (", for inpainting" if inpaints else ""),
            base_model_version=cls.name_base_model(denoiser),
            architecture="stable-diffusion-xl-v1-base",
            implementation=STABILITY_AI,
            text_parts=cls.text_parts,
            adapter_text_lrs=1,
            checkpoint=("denoiser", "clip_l", "clip_g", "vae"),
            inpaints=inpaints,
            pipeline=_unet.choose_pipeline(_PIPELINE, inpaints=inpaints),
            networks={"denoiser": denoiser, "clip_l": clip_l, "clip_g": clip_g, "vae": vae},
            objective=objective,
            latents=_vae.make_latent_spec(vae.config, patch=1, size_multiple=32),
            notes=notes,
            declared=declared,
        )

    @classmethod
    def name_base_model(cls, denoiser: Network) -> str:
        return "sdxl_base_v1-0"

    @classmethod
    def load_tokenizers(cls, blueprint: Blueprint, model: ModelOptions) -> dict[str, Any]:
        folders = _clip.find_tokenizer_folders(blueprint, model, {"clip_l": "tokenizer", "clip_g": "tokenizer_2"})
        tokenizers: dict[str, Any] = {
            "clip_l": _tokenizers.load_clip_tokenizer(folders["clip_l"]),
            "clip_g": _tokenizers.load_clip_tokenizer(folders["clip_g"], pad_with_zero=True),
        }
        for name, tokenizer in tokenizers.items():
            _clip.check_vocabulary(tokenizer, blueprint.networks[name].config)
        return tokenizers

    @classmethod
    def builders(cls, blueprint: Blueprint) -> Mapping[str, Builder]:
        return {"denoiser": _unet.build, "clip_l": _clip.build, "clip_g": _open_clip.build_projected}

    def unread_layers(self, part: str) -> Sequence[str]:
        config = self.blueprint.networks[part].config
        if part != "clip_l":  # the pooled vector of the other comes from its last layer
            return ()
        return (*_clip.list_unread_layers(config, _clip.PENULTIMATE), "final_layer_norm.{*}")

    @classmethod
    def adapter_specs(cls, shapes: Mapping[str, Sequence[int]]) -> Mapping[str, PartSpec]:
        denoiser = _unet_spec(_unet.guess_key_map(_PUBLISHED_CONFIG, shapes))
        return {"denoiser": denoiser, "clip_l": clip_l_spec(), "clip_g": clip_g_spec()}

    def encode_text(self, part: str, captions: Sequence[str]) -> list[Tensors]:
        encoder, tokenizer = self.parts[part].module, self.tokenizers[part]
        ids = _clip.tokenize(tokenizer, captions, self.parts[part].device, chunks=self.chunks)
        if part == "clip_l":
            hidden, _ = _clip.encode_states(encoder, ids, layer=_clip.PENULTIMATE)
            return [{"hidden": row} for row in _clip.join_chunks(hidden, self.chunks)]
        end = tokenizer.eos_token_id
        hidden, pooled = _open_clip.encode_hidden_and_pooled(encoder, ids, end, layer=_clip.PENULTIMATE)
        rows, vectors = _clip.join_chunks(hidden, self.chunks), pooled[:: self.chunks]  # the first chunk's vector
        return [{"hidden": row, "pooled": vector} for row, vector in zip(rows, vectors, strict=True)]

    def apply_prompt_weights(self, part: str, features: Tensors, pieces: WeightedText) -> Tensors:
        return _clip.apply_prompt_weights(
            self.tokenizers[part], features, pieces, chunks=self.chunks, mode=self.model_options.emb_normalize_mode
        )

    def token_budget(self, part: str, captions: Sequence[str]) -> TokenBudget:
        return TokenBudget(_tokenizers.count_tokens(self.tokenizers[part], captions), _clip.CHUNK_LENGTH * self.chunks)

    def text_fingerprint(self, part: str) -> str:
        return _clip.fingerprint_clip(
            self.tokenizers[part],
            layer=_clip.PENULTIMATE,
            chunks=self.chunks,
            mode=self.model_options.emb_normalize_mode,
        )

    def condition(self, features: Mapping[str, Tensors], sizes: Sizes, guidance: float | None) -> Tensors:
        text = torch.cat([features["clip_l"]["hidden"], features["clip_g"]["hidden"]], dim=-1)
        time_ids = torch.cat([sizes.original, sizes.crop, sizes.target], dim=1)
        return {
            "encoder_hidden_states": text,
            "text_embeds": features["clip_g"]["pooled"],
            "time_ids": time_ids.to(
                text.device, torch.float32, non_blocking=True
            ),  # bfloat16 rounds to multiples of 4 here
        }

    def add_images(self, arguments: dict[str, object], noisy: Tensor, images: Images) -> dict[str, object]:
        return _unet.add_inpaint_channels(arguments, images) if self.blueprint.inpaints else arguments

    def make_inputs(self, noisy: Tensor, t: Tensor, conditioning: Tensors) -> dict[str, object]:
        weight = next(self.denoiser.parameters())
        added = {"text_embeds": conditioning["text_embeds"].to(weight.dtype), "time_ids": conditioning["time_ids"]}
        return {
            "sample": noisy.to(weight.dtype),
            "timestep": t.to(noisy.device, non_blocking=True),
            "encoder_hidden_states": conditioning["encoder_hidden_states"].to(weight.dtype),
            "added_cond_kwargs": added,
        }


def _find_encoder(source: Source, part: str, folder: str) -> Source | None:
    """The checkpoint where it has the encoder, else what stands for it."""
    if source.has_network(folder) or source.find_prefix(_ENCODER_PREFIXES[part]):
        return source
    return source.find_cached(part)


def _complete_config(config: Mapping[str, Any], clip_g: Network) -> dict[str, Any]:
    """The projected vector is the pooled text and a sinusoidal embedding of each size; what is left is their width."""
    rest = config["projection_class_embeddings_input_dim"] - clip_g.config["projection_dim"]
    return {"addition_time_embed_dim": rest // NUM_SIZES, **_unet.count_heads(config)}
