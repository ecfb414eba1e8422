"""Options of what is saved: files, their metadata, and uploads to the hub."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr

from sfumato.config.base import Options, option
from sfumato.config.values import Counts, FileName, FilePath

ADAPTER_FILE_ONLY = "an adapter is one file; only full training saves text encoders"


class SaveOptions(Options):
    """Saving"""

    output_dir: FilePath | None = option(None, "output folder")
    output_name: FileName = option("last", "name of the output files, without extension")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, "precision of the saved file; default: as trained"
    )
    save_model_as: Literal["ckpt", "pt", "safetensors", "diffusers", "diffusers_safetensors"] | None = option(
        None, "file format; default: safetensors, or a folder for a full model that was loaded from one"
    )
    extract_lora_at_end: int | None = option(
        None,
        "after full training, also write what it has changed as a LoRA of this rank, beside the model: NAME_lora",
        ge=1,
    )
    use_safetensors: bool = option(
        False, "save as safetensors where --save_model_as is not given", no_effect="it is the default"
    )
    mem_eff_save: bool = option(False, "save with less memory", no_effect="every file is written tensor by tensor")
    save_every_n_epochs: int | None = option(None, "save every N epochs", ge=1)
    save_every_n_steps: int | None = option(None, "save every N steps", ge=1)
    save_at_steps: Counts = option((), "also save after these steps; these files are never removed")
    save_at_epochs: Counts = option((), "also save after these epochs; these files are never removed")
    save_n_epoch_ratio: int | None = option(
        None, "save about N times, evenly over the epochs; takes precedence over --save_every_n_epochs", ge=1
    )
    save_last_n_epochs: int | None = option(None, "keep only the saves of the last N epochs", ge=1)
    save_last_n_steps: int | None = option(None, "keep only the saves of the last N steps", ge=1)
    save_state: bool = option(False, "save the training state with each save, for --resume")
    save_state_on_train_end: bool = option(False, "save the training state at the end only")
    save_last_n_epochs_state: int | None = option(
        None, "keep only the states of the last N epochs; default: --save_last_n_epochs", ge=1
    )
    save_last_n_steps_state: int | None = option(
        None, "keep only the states of the last N steps; default: --save_last_n_steps", ge=1
    )
    resume: FilePath | None = option(None, "folder of a saved state to resume from", path="folder")
    no_metadata: bool = option(False, "save only the metadata that is needed to use the file")
    training_comment: str | None = option(None, "comment in the metadata")
    save_clip: bool = option(False, "save the CLIP text encoders, too", no_effect=ADAPTER_FILE_ONLY)
    save_t5xxl: bool = option(False, "save T5-XXL, too", no_effect=ADAPTER_FILE_ONLY)


class MetadataOptions(Options):
    """Metadata of the saved file"""

    metadata_title: str | None = option(None, "title; default: --output_name")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "license")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "usage hint")
    metadata_thumbnail: str | None = option(None, "thumbnail: an image file, or a data URL")
    metadata_merged_from: str | None = option(None, "models that it was merged from")
    metadata_trigger_phrase: str | None = option(None, "trigger phrase")
    metadata_preprocessor: str | None = option(None, "preprocessor of the control image")
    metadata_is_negative_embedding: str | None = option(None, "whether it is a negative embedding")


class HubOptions(Options):
    """Uploads to the hub"""

    huggingface_repo_id: str | None = option(
        None, "repository to upload to, e.g. user/name; created if it does not exist"
    )
    huggingface_repo_type: str | None = option(None, "model, dataset or space; default: model")
    huggingface_path_in_repo: str | None = option(None, "folder in the repository")
    huggingface_token: SecretStr | None = option(None, "access token; prefer HF_TOKEN or `hf auth login`")
    huggingface_repo_visibility: str | None = option(None, "public; anything else creates a private repository")
    save_state_to_huggingface: bool = option(False, "upload saved states, too")
    resume_from_huggingface: bool = option(
        False, "--resume names a state on the hub: user/repository/path[:revision[:type]]"
    )
    async_upload: bool = option(False, "upload while training continues")
