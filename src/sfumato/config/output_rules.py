"""Rules between the options of saving, of the hub and of the logs."""

from __future__ import annotations

from sfumato.config.rule import Rule

TO_REPOSITORY = (
    "huggingface_repo_type",
    "huggingface_path_in_repo",
    "huggingface_repo_visibility",
    "save_state_to_huggingface",
    "async_upload",
)

OUTPUT_RULES = (
    Rule(
        name="log-folder",
        kind="conflict",
        options=("log_with", "logging_dir"),
        broken=lambda c: c.log.log_with in ("tensorboard", "all") and c.log.logging_dir is None,
        what="--log_with has no folder to write curves into",
        fix="give --logging_dir",
    ),
    Rule(
        name="wandb-off",
        kind="no effect",
        options=("log_with", "wandb_run_name", "wandb_api_key"),
        broken=lambda c: c.log.log_with not in ("wandb", "all") and c.changed("wandb_run_name", "wandb_api_key"),
        what="--wandb_run_name and --wandb_api_key have no effect without wandb",
        fix="give --log_with wandb",
    ),
    Rule(
        name="no-tracker",
        kind="no effect",
        options=("log_with", "logging_dir", "log_tracker_name", "log_tracker_config", "log_prefix", "log_config"),
        broken=lambda c: (
            c.log.log_with is None
            and c.log.logging_dir is None
            and c.changed("log_tracker_name", "log_tracker_config", "log_prefix", "log_config")
        ),
        what="--log_tracker_name, --log_tracker_config, --log_prefix and --log_config have no effect without a tracker",
        fix="give --logging_dir, or --log_with wandb",
    ),
    Rule(
        name="ratio-and-epochs",
        kind="no effect",
        options=("save_every_n_epochs", "save_n_epoch_ratio"),
        broken=lambda c: c.changed("save_every_n_epochs") and c.changed("save_n_epoch_ratio"),
        what="--save_every_n_epochs has no effect: --save_n_epoch_ratio goes before it",
        fix="give one of them",
    ),
    Rule(
        name="pickled-adapter",
        kind="note",
        options=("save_model_as", "method"),
        broken=lambda c: c.run.method == "adapter" and c.save.save_model_as in ("ckpt", "pt"),
        what="a ckpt or pt file of an adapter has no room for metadata: it holds no word of how it was made",
        fix="--save_model_as safetensors",
    ),
    Rule(
        name="hub-without-repository",
        kind="no effect",
        options=("huggingface_repo_id", "huggingface_token", "resume_from_huggingface", *TO_REPOSITORY),
        broken=lambda c: (
            c.hub.huggingface_repo_id is None
            and (c.changed(*TO_REPOSITORY) or (c.changed("huggingface_token") and not c.hub.resume_from_huggingface))
        ),
        what="nothing is uploaded to the hub: there is no repository to upload to",
        fix="give --huggingface_repo_id",
    ),
    Rule(
        name="hub-without-states",
        kind="no effect",
        options=("save_state_to_huggingface", "save_state", "save_state_on_train_end"),
        broken=lambda c: (
            c.hub.save_state_to_huggingface and not c.save.save_state and not c.save.save_state_on_train_end
        ),
        what="--save_state_to_huggingface has no effect: no states are saved",
        fix="give --save_state or --save_state_on_train_end",
    ),
    Rule(
        name="hub-type",
        kind="conflict",
        options=("huggingface_repo_type",),
        broken=lambda c: c.hub.huggingface_repo_type not in (None, "model", "dataset", "space"),
        what="--huggingface_repo_type names no kind of repository",
        fix="give model, dataset or space",
    ),
    Rule(
        name="hub-nothing-to-resume",
        kind="conflict",
        options=("resume_from_huggingface", "resume"),
        broken=lambda c: c.hub.resume_from_huggingface and c.save.resume is None,
        what="--resume_from_huggingface has no name to fetch a state by",
        fix="give --resume user/repository/path",
    ),
)
