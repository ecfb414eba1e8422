"""Options of what is saved: files, their metadata, and copies on the hub."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr

from sfumato.config.base import Options, option
from sfumato.config.values import Counts, FilePath

ONE_FILE = "an adapter is one file; only full training saves text encoders"


class SaveOptions(Options):
    """Saving"""

    output_dir: FilePath | None = option(None, "folder of everything that is saved")
    output_name: str = option("last", "name of the saved files, without ending")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, "precision of the file; without it as trained"
    )
    save_model_as: Literal["ckpt", "pt", "safetensors", "diffusers", "diffusers_safetensors"] | None = option(
        None, "file format; without it safetensors, or a folder where a whole model came from one"
    )
    use_safetensors: bool = option(
        False, "save as safetensors where --save_model_as does not say", no_effect="weights are always saved so"
    )
    mem_eff_save: bool = option(False, "save with less memory", no_effect="every file is written tensor by tensor")
    save_every_n_epochs: int | None = option(None, "save after every Nth epoch", ge=1)
    save_every_n_steps: int | None = option(None, "save after every Nth step", ge=1)
    save_at_steps: Counts = option((), "save after these steps, too; such saves stay")
    save_at_epochs: Counts = option((), "save after these epochs, too; such saves stay")
    save_n_epoch_ratio: int | None = option(
        None, "save about N times, evenly over the epochs; goes before --save_every_n_epochs", ge=1
    )
    save_last_n_epochs: int | None = option(None, "keep only the saves of the last N epochs", ge=1)
    save_last_n_steps: int | None = option(None, "keep only the saves of the last N steps", ge=1)
    save_state: bool = option(False, "save the state of training with each save, for --resume")
    save_state_on_train_end: bool = option(False, "save the state at the end only")
    save_last_n_epochs_state: int | None = option(
        None, "the same as --save_last_n_epochs for states; without it that", ge=1
    )
    save_last_n_steps_state: int | None = option(
        None, "the same as --save_last_n_steps for states; without it that", ge=1
    )
    resume: FilePath | None = option(None, "folder of a saved state to go on from", path="folder")
    no_metadata: bool = option(False, "write only the metadata that is needed to use the file")
    training_comment: str | None = option(None, "a comment for the metadata")
    save_clip: bool = option(False, "save the CLIP encoders, too", no_effect=ONE_FILE)
    save_t5xxl: bool = option(False, "save T5-XXL, too", no_effect=ONE_FILE)


class MetadataOptions(Options):
    """Metadata of the saved file"""

    metadata_title: str | None = option(None, "title; without it --output_name")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "licence")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "hint on how to use it")
    metadata_thumbnail: str | None = option(None, "picture file, or a data URL")
    metadata_merged_from: str | None = option(None, "models it was merged from")
    metadata_trigger_phrase: str | None = option(None, "words that call it up")
    metadata_preprocessor: str | None = option(None, "what prepares its control image")
    metadata_is_negative_embedding: str | None = option(None, "whether it is meant for the negative prompt")


class HubOptions(Options):
    """Copies on the hub"""

    huggingface_repo_id: str | None = option(None, "repository to upload to, as name/repository; made if it is missing")
    huggingface_repo_type: str | None = option(None, "model, dataset or space; without it model")
    huggingface_path_in_repo: str | None = option(None, "folder inside the repository")
    huggingface_token: SecretStr | None = option(None, "access token; better given by HF_TOKEN or `hf auth login`")
    huggingface_repo_visibility: str | None = option(
        None, "public, or private for everything else, if it has to be made"
    )
    save_state_to_huggingface: bool = option(False, "upload saved states, too")
    resume_from_huggingface: bool = option(
        False, "--resume names a state on the hub: user/repository/path[:revision[:type]]"
    )
    async_upload: bool = option(False, "upload while training goes on")
