"""Metadata of saved files: sd-scripts' ss_ keys and the model spec's keys. They hold names of files, never paths."""

from __future__ import annotations

import base64
import json
import mimetypes
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sfumato import __version__
from sfumato.common.files import read_file
from sfumato.common.names import DEFAULT_NETWORK_MODULE, find_default_rank
from sfumato.common.text import strip_paths
from sfumato.config import Config, ModelOptions
from sfumato.errors import UserError
from sfumato.formats.hashes import calculate_model_hash, calculate_sha256

PROGRAM = f"sfumato {__version__}"
EMA_KEY = "sfumato.ema"  # which EMA of the weights a file holds, as JSON
FROZEN_KEY = "sfumato.frozen_lora"  # the adapters that took part in training beside the saved one, as JSON
MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    EMA_KEY,
    FROZEN_KEY,
)
# Keys whose value is the option of the same name without ss_.
SAME_NAMES = (
    "learning_rate", "gradient_checkpointing", "gradient_accumulation_steps",
    "lr_warmup_steps", "lr_scheduler", "mixed_precision", "full_fp16", "v2", "clip_skip",
    "max_token_length", "cache_latents", "lowram", "noise_offset", "multires_noise_iterations",
    "multires_noise_discount", "adaptive_noise_scale", "zero_terminal_snr", "training_comment", "max_grad_norm",
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "face_crop_aug_range",
    "prior_loss_weight", "min_snr_gamma", "ip_noise_gamma", "noise_offset_random_strength",
    "ip_noise_gamma_random_strength", "loss_type", "huber_schedule", "huber_scale", "huber_c", "fp8_base",
    "fp8_base_unet", "validation_seed", "validation_split", "max_validation_steps", "validate_every_n_epochs",
    "validate_every_n_steps", "resize_interpolation",
)  # fmt: skip
JSON_KEYS = (  # written as JSON, the others as Python writes them
    "ss_datasets", "ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_bucket_info", "ss_network_args",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What the metadata says of a run beyond its options; known before the first step."""

    session_id: int
    started_at: float  # Unix time
    total_steps: int
    epochs: int
    base_model_version: str
    optimizer: str  # module.Class(arguments)
    data: Mapping[str, Any]  # ss_ keys about the data
    family: Mapping[str, Any]  # ss_ keys that only some families have
    method: Mapping[str, Any]  # ss_ keys about what is trained


def make_training_metadata(config: Config, facts: TrainingFacts) -> dict[str, str]:
    """All ss_ keys that are known before training; values are texts as Python writes them, tables JSON.

    Raises UserError for a thumbnail that cannot be read, long before the first save needs it.
    """
    read_thumbnail(config.metadata.metadata_thumbnail)
    values: dict[str, Any] = {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_output_name": config.save.output_name,
        **{f"ss_{name}": config.value(name) for name in SAME_NAMES},
        "ss_debiased_estimation": config.loss.debiased_estimation_loss,
        "ss_num_epochs": facts.epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_base_model_version": facts.base_model_version,
        "ss_seed": config.loop.seed,
        "ss_sd_scripts_commit_hash": PROGRAM,
        "ss_optimizer": strip_paths(facts.optimizer),
        **facts.data,
        **facts.family,
        **facts.method,
    }
    if config.cache.cache_text_encoder_outputs and config.cache.text_cache_variants > 1:
        values["ss_text_cache_variants"] = config.cache.text_cache_variants
    return {name: json.dumps(value) if name in JSON_KEYS else str(value) for name, value in values.items()}


def make_adapter_metadata(config: Config) -> dict[str, Any]:
    """The keys that only adapter files have."""
    network, optim = config.network, config.optim
    dim = network.network_dim or find_default_rank(network.network_module)
    values: dict[str, Any] = {
        "ss_network_module": network.network_module or DEFAULT_NETWORK_MODULE,
        "ss_network_dim": dim,
        "ss_network_alpha": network.network_alpha or dim,
        "ss_network_dropout": network.network_dropout,
        "ss_scale_weight_norms": network.scale_weight_norms,
        "ss_unet_lr": optim.unet_lr,
        "ss_text_encoder_lr": None if optim.text_encoder_lr is None else list(optim.text_encoder_lr),
    }
    if network.frozen_lora:
        frozen = [{"name": each.path.name, "strength": each.strength, "use": each.use} for each in network.frozen_lora]
        values[FROZEN_KEY] = json.dumps(frozen)
    if network.network_args:
        arguments = {**network.network_args}
        if network.network_dropout is not None:
            arguments["dropout"] = network.network_dropout
        values["ss_network_args"] = {name: strip_paths(str(value)) for name, value in arguments.items()}
    return values


def describe_file(kind: str, source: str | Path | None) -> dict[str, str]:
    """Name and hashes of the checkpoint ("sd_model") or of --vae ("vae"); {} for None.

    Hashes only of local files. Takes about a second per 1.5 GB the first time in a process.
    """
    if source is None:
        return {}
    path = Path(source)
    if not path.exists():
        return {f"ss_{kind}_name": strip_paths(str(source))}  # a name on the hub stays as it is
    name = path.resolve().name if path.name in ("", "..") else path.name
    return {
        f"ss_{kind}_name": name,
        f"ss_{kind}_hash": calculate_model_hash(path),
        f"ss_new_{kind}_hash": calculate_sha256(path),
    }


def describe_files(model: ModelOptions) -> dict[str, str]:
    """Names and hashes of the checkpoint and of --vae."""
    return describe_file("sd_model", model.pretrained_model_name_or_path) | describe_file("vae", model.vae)


def add_save_facts(metadata: Mapping[str, str], *, step: int, epoch: int) -> dict[str, str]:
    """The metadata with what is known only when a file is written."""
    now = {"ss_training_finished_at": str(time.time()), "ss_steps": str(step), "ss_epoch": str(epoch)}
    return {**metadata, **now}


def keep_minimum(metadata: Mapping[str, str]) -> dict[str, str]:
    """The keys that --no_metadata keeps, those that programs need to use the file."""
    return {name: metadata[name] for name in MINIMUM_KEYS if name in metadata}


def make_modelspec(
    config: Config, *, architecture: str, implementation: str, prediction_type: str, resolution: tuple[int, int]
) -> dict[str, str]:
    """The keys of model spec 1.0.1. prediction_type: "epsilon", "v", or "" for flow models (no word there)."""
    options, noise = config.metadata, config.noise
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": implementation,
        "implementation_version": PROGRAM,
        "title": options.metadata_title or config.save.output_name,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "prediction_type": prediction_type,
        "author": options.metadata_author,
        "description": options.metadata_description,
        "license": options.metadata_license,
        "tags": options.metadata_tags,
        "usage_hint": options.metadata_usage_hint,
        "thumbnail": read_thumbnail(options.metadata_thumbnail),
        "merged_from": options.metadata_merged_from and strip_paths(options.metadata_merged_from),
        "trigger_phrase": options.metadata_trigger_phrase,
        "preprocessor": options.metadata_preprocessor,
        "is_negative_embedding": options.metadata_is_negative_embedding,
        "encoder_layer": config.model.clip_skip and str(config.model.clip_skip),
    }
    if noise.min_timestep is not None or noise.max_timestep is not None:
        highest = 1000 if noise.max_timestep is None else noise.max_timestep
        values["timestep_range"] = f"{noise.min_timestep or 0},{highest}"
    return {f"modelspec.{name}": value for name, value in values.items() if value}


@lru_cache(maxsize=4)
def read_thumbnail(source: str | None) -> str | None:
    """A data URL as it is, or an image file as one; read once, for all saves of a run."""
    if source is None or source.startswith("data:"):
        return source
    kind = mimetypes.guess_type(source)[0] or "image/jpeg"
    try:
        return f"data:{kind};base64," + base64.b64encode(read_file(source)).decode()
    except OSError as error:
        raise UserError(
            f"--metadata_thumbnail: cannot read {source} ({error.strerror})", code="thumbnail-unreadable"
        ) from error
