"""Rules between the options of training from prompts alone, and from pairs of images."""

from __future__ import annotations

from sfumato.config.cache import CacheOptions
from sfumato.config.dataset import BucketOptions, DatasetOptions, ImageOptions
from sfumato.config.evaluation import ValidationOptions
from sfumato.config.network import LecoOptions
from sfumato.config.option_rule import OptionRule
from sfumato.config.schema import Config

UNUSED = (
    *(name for name in DatasetOptions.model_fields if name != "debug_dataset"),
    *BucketOptions.model_fields,
    *ImageOptions.model_fields,
    *ValidationOptions.model_fields,
    *(name for name in CacheOptions.model_fields if "latents" in name or name == "vae_batch_size"),
    *("min_timestep", "max_timestep", "timestep_sampling", "weighting_scheme", "ip_noise_gamma", "text_encoder_lr"),
)


def is_leco(config: Config) -> bool:
    return config.run.method == "leco"


LECO_RULES = (
    OptionRule(
        code="prompts-file-missing",
        severity="conflict",
        options=("method", "prompts_file"),
        is_broken=lambda c: is_leco(c) and c.leco.prompts_file is None,
        what="no prompts to train from",
        fix="give --prompts_file",
    ),
    OptionRule(
        code="prompts-file-without-leco",
        severity="conflict",
        options=("method", *LecoOptions.model_fields),
        is_broken=lambda c: not is_leco(c) and c.is_changed(*LecoOptions.model_fields),
        what="--prompts_file, --max_denoising_steps and --leco_denoise_guidance_scale belong to --method leco",
        fix="give --method leco, or remove them",
    ),
    OptionRule(
        code="leco-text-encoder-only",
        severity="conflict",
        options=("method", "network_train_text_encoder_only"),
        is_broken=lambda c: is_leco(c) and c.network.network_train_text_encoder_only,
        what="--method leco trains the denoiser alone, and --network_train_text_encoder_only excludes it",
        fix="remove --network_train_text_encoder_only",
    ),
    OptionRule(
        code="leco-options-unused",
        severity="no effect",
        options=("method", *UNUSED),
        is_broken=lambda c: is_leco(c) and any(c.is_changed(name) and c.source(name) != "launcher" for name in UNUSED),
        what="options of images, timesteps and text encoders",
        reason="--method leco trains the denoiser from prompts alone",
        fix="remove --train_data_dir, --resolution, --min_timestep, --text_encoder_lr and the like",
    ),
    OptionRule(
        code="slider-reference-dropout",
        severity="conflict",
        options=("method", "reference_dropout_rate"),
        is_broken=lambda c: c.run.has_pairs and c.dataset.reference_dropout_rate > 0,
        what="--method image_slider trains both images of each pair, and --reference_dropout_rate drops one of them",
        fix="remove --reference_dropout_rate",
    ),
)
