"""Options of the base model and its text encoders."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from sfumato.config.base import Options, Shown, option
from sfumato.config.values import FilePath, ModelPath, ModelPaths, as_precision, as_token_length

Precision = Annotated[str, AfterValidator(as_precision)]
TokenLength = Annotated[Literal[150, 225] | None, BeforeValidator(as_token_length), Shown("75|150|225")]


class ModelOptions(Options):
    """Base model"""

    pretrained_model_name_or_path: ModelPath | None = option(
        None, "the model to start from: a checkpoint file, a Diffusers folder or a name on the hub", path="model"
    )
    vae: ModelPath | None = option(None, "a VAE to use instead of the model's own", path="model")
    no_half_vae: bool = option(False, "keep the VAE in float32")
    tokenizer: ModelPaths = option(
        (), "tokenizers, one per text encoder in the model's order: folders or names on the hub", path="model"
    )
    tokenizer_cache_dir: FilePath | None = option(
        None, "folder that keeps downloaded tokenizers", no_effect="tokenizers are shipped or read from folders"
    )
    clip_skip: int | None = option(None, "use the output of CLIP's Nth layer from the end", ge=1)
    max_token_length: TokenLength = option(None, "longest caption in tokens")
    v2: bool = option(False, "the model is Stable Diffusion 2")
    v_parameterization: bool = option(False, "the model predicts v instead of noise")
    lowram: bool = option(
        False, "load weights straight onto the device", no_effect="each tensor always goes there as soon as it is read"
    )
    disable_mmap_load_safetensors: bool = option(
        False, "read safetensors files without mapping them into memory", no_effect="they are never mapped"
    )
    model_type: Literal["flux", "chroma"] | None = option(
        None, "which variant of the architecture the checkpoint is; without it the script's own"
    )
    clip_l: ModelPath | None = option(None, "CLIP-L text encoder", path="model")
    clip_g: ModelPath | None = option(None, "CLIP-G text encoder", path="model")
    t5xxl: ModelPath | None = option(None, "T5-XXL text encoder", path="model")
    gemma2: ModelPath | None = option(None, "Gemma 2 text encoder", path="model")
    ae: ModelPath | None = option(None, "autoencoder file", path="model")
    controlnet_model_name_or_path: ModelPath | None = option(
        None, "ControlNet to start from", path="model", planned="ControlNet training"
    )
    t5xxl_max_token_length: int | None = option(
        None, "longest caption for T5-XXL; without it the model's own limit", ge=1
    )
    gemma2_max_token_length: int | None = option(
        None, "longest caption for Gemma 2, its begin token included; without it 256", ge=1
    )
    t5xxl_device: str | None = option(None, "device of T5-XXL, as cpu; without it the others'")
    t5xxl_dtype: Precision | None = option(None, "precision of T5-XXL, as bf16; without it the others'")
    apply_t5_attn_mask: bool = option(False, "hide the padding of T5-XXL's tokens from attention")
    apply_lg_attn_mask: bool = option(False, "put zeros in place of CLIP-L's and CLIP-G's padding")
    guidance_scale: float | None = option(None, "embedded guidance during training; without it the family's own", ge=0)
    system_prompt: str = option("", "text put before every caption and prompt, but not before a negative one")
    pos_emb_random_crop_rate: float = option(0.0, "chance of a random crop of the position table", ge=0, le=1)
    enable_scaled_pos_embed: bool = option(False, "scale the position table to each resolution")
