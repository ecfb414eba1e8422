"""Options of the base model and its text encoders."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import FilePath, ModelPath, ModelPaths, parse_precision, parse_token_length

Precision = Annotated[str, AfterValidator(parse_precision)]
TokenLength = Annotated[Literal[150, 225] | None, BeforeValidator(parse_token_length), Metavar("75|150|225")]


class ModelOptions(Options):
    """Base model"""

    pretrained_model_name_or_path: ModelPath | None = option(
        None, "base model: a checkpoint file, a Diffusers folder or a name on the hub", path="model"
    )
    vae: ModelPath | None = option(None, "VAE that replaces the model's own", path="encoder")
    no_half_vae: bool = option(False, "keep the VAE in float32")
    tokenizer: ModelPaths = option(
        (), "tokenizers, one per text encoder in the model's order: folders or names on the hub", path="model"
    )
    tokenizer_cache_dir: FilePath | None = option(
        None, "folder for downloaded tokenizers", no_effect="tokenizers are shipped or read from folders"
    )
    clip_skip: int | None = option(None, "use the output of CLIP's Nth layer from the end", ge=1)
    max_token_length: TokenLength = option(None, "maximum caption length in tokens")
    v2: bool = option(False, "the model is Stable Diffusion 2")
    v_parameterization: bool = option(False, "the model predicts v instead of noise")
    lowram: bool = option(
        False, "load weights directly onto the device", no_effect="each tensor always goes there as soon as it is read"
    )
    disable_mmap_load_safetensors: bool = option(
        False, "read safetensors files without memory mapping", no_effect="they are never mapped"
    )
    model_type: Literal["flux", "flux_kontext", "chroma"] | None = option(
        None, "variant of the architecture; default: that of the script"
    )
    clip_l: ModelPath | None = option(None, "CLIP-L text encoder", path="encoder")
    clip_g: ModelPath | None = option(None, "CLIP-G text encoder", path="encoder")
    t5xxl: ModelPath | None = option(None, "T5-XXL text encoder", path="encoder")
    gemma2: ModelPath | None = option(None, "Gemma 2 text encoder", path="encoder")
    ae: ModelPath | None = option(None, "autoencoder file", path="encoder")
    controlnet_model_name_or_path: ModelPath | None = option(
        None,
        "ControlNet to start from, or to generate with: a file, a folder of diffusers or a name on the hub",
        path="model",
    )
    t5xxl_max_token_length: int | None = option(
        None, "maximum caption length in tokens of T5-XXL; default: the model's limit", ge=1
    )
    gemma2_max_token_length: int | None = option(
        None, "maximum caption length in tokens of Gemma 2, its begin token included; default: 256", ge=1
    )
    t5xxl_device: str | None = option(None, "device of T5-XXL, e.g. cpu; default: that of the other encoders")
    t5xxl_dtype: Precision | None = option(None, "precision of T5-XXL, e.g. bf16; default: that of the other encoders")
    apply_t5_attn_mask: bool = option(False, "mask the padding tokens of T5-XXL in attention")
    apply_lg_attn_mask: bool = option(False, "zero the padding tokens of CLIP-L and CLIP-G")
    guidance_scale: float | None = option(None, "embedded guidance during training; default: that of the family", ge=0)
    emb_normalize_mode: Literal["original", "none", "abs"] = option(
        "original",
        "what weighted words leave of the features' size: the mean, nothing, or the mean of absolute values",
    )
    system_prompt: str = option("", "text before every caption and prompt, but not before a negative one")
    add_system_prompt_to_negative_prompt: bool = option(False, "--system_prompt is before negative prompts, too")
    pos_emb_random_crop_rate: float = option(0.0, "probability of a random crop of the position embedding", ge=0, le=1)
    enable_scaled_pos_embed: bool = option(False, "scale the position embedding to each resolution")
