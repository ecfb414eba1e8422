"""Rules between the options of saving, samples, logs, the hub and where training starts."""

from __future__ import annotations

from sfumato.config.option_rule import OptionRule
from sfumato.config.run import ADAPTER_METHODS
from sfumato.config.schema import Config

REPOSITORY_OPTIONS = (
    "huggingface_repo_type",
    "huggingface_path_in_repo",
    "huggingface_repo_visibility",
    "save_state_to_huggingface",
    "async_upload",
)


def samples_enabled(config: Config) -> bool:
    return config.is_changed("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")


_UNUSED = (
    OptionRule(
        code="keep-epochs-unused",
        severity="no effect",
        options=("save_last_n_epochs", "save_every_n_epochs", "save_n_epoch_ratio"),
        is_broken=lambda c: (
            c.is_changed("save_last_n_epochs") and not c.is_changed("save_every_n_epochs", "save_n_epoch_ratio")
        ),
        what="--save_last_n_epochs",
        reason="nothing is saved by epochs",
        fix="give --save_every_n_epochs",
    ),
    OptionRule(
        code="keep-steps-unused",
        severity="no effect",
        options=("save_last_n_steps", "save_every_n_steps"),
        is_broken=lambda c: c.is_changed("save_last_n_steps") and not c.is_changed("save_every_n_steps"),
        what="--save_last_n_steps",
        reason="nothing is saved by steps",
        fix="give --save_every_n_steps",
    ),
    OptionRule(
        code="keep-states-unused",
        severity="no effect",
        options=("save_last_n_epochs_state", "save_last_n_steps_state", "save_state"),
        is_broken=lambda c: (
            c.is_changed("save_last_n_epochs_state", "save_last_n_steps_state") and not c.save.save_state
        ),
        what="--save_last_n_epochs_state and --save_last_n_steps_state",
        reason="without --save_state",
        fix="give --save_state",
    ),
    OptionRule(
        code="save-ratio-takes-precedence",
        severity="no effect",
        options=("save_every_n_epochs", "save_n_epoch_ratio"),
        is_broken=lambda c: c.is_changed("save_every_n_epochs") and c.is_changed("save_n_epoch_ratio"),
        what="--save_every_n_epochs",
        reason="--save_n_epoch_ratio takes precedence",
        fix="give one of them",
    ),
    OptionRule(
        code="epochs-take-precedence",
        severity="no effect",
        options=("max_train_steps", "max_train_epochs"),
        is_broken=lambda c: (
            c.loop.max_train_epochs is not None and c.source("max_train_steps") not in ("default", "launcher", "preset")
        ),
        what="--max_train_steps",
        reason="--max_train_epochs takes precedence",
        fix="give one of them",
    ),
    OptionRule(
        code="initial-step-takes-precedence",
        severity="no effect",
        options=("initial_epoch", "initial_step"),
        is_broken=lambda c: c.loop.initial_epoch is not None and c.loop.initial_step is not None,
        what="--initial_epoch",
        reason="--initial_step takes precedence",
        fix="give one of them",
    ),
    OptionRule(
        code="skip-without-initial-step",
        severity="no effect",
        options=("skip_until_initial_step", "initial_epoch", "initial_step"),
        is_broken=lambda c: c.loop.skip_until_initial_step and not c.is_changed("initial_epoch", "initial_step"),
        what="--skip_until_initial_step",
        reason="without --initial_step or --initial_epoch; a resumed run always continues with its own data",
        fix="remove it, or give --initial_step",
    ),
    OptionRule(
        code="sample-prompts-missing",
        severity="no effect",
        options=("sample_prompts", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
        is_broken=lambda c: samples_enabled(c) and c.samples.sample_prompts is None,
        what="--sample_every_n_steps, --sample_every_n_epochs and --sample_at_first",
        reason="--sample_prompts is missing",
        fix="give --sample_prompts",
    ),
    OptionRule(
        code="sample-prompts-unused",
        severity="no effect",
        options=("sample_prompts", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
        is_broken=lambda c: c.samples.sample_prompts is not None and not samples_enabled(c),
        what="--sample_prompts",
        reason="sampling is not enabled",
        fix="give --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first",
    ),
    OptionRule(
        code="sample-epochs-take-precedence",
        severity="no effect",
        options=("sample_every_n_steps", "sample_every_n_epochs"),
        is_broken=lambda c: c.samples.sample_every_n_steps is not None and c.samples.sample_every_n_epochs is not None,
        what="--sample_every_n_steps",
        reason="--sample_every_n_epochs takes precedence",
        fix="give one of them",
    ),
    OptionRule(
        code="wandb-disabled",
        severity="no effect",
        options=("log_with", "wandb_run_name", "wandb_api_key"),
        is_broken=lambda c: c.log.log_with not in ("wandb", "all") and c.is_changed("wandb_run_name", "wandb_api_key"),
        what="--wandb_run_name and --wandb_api_key",
        reason="without wandb",
        fix="give --log_with wandb",
    ),
    OptionRule(
        code="tracker-missing",
        severity="no effect",
        options=("log_with", "logging_dir", "log_tracker_name", "log_tracker_config", "log_prefix", "log_config"),
        is_broken=lambda c: (
            c.log.log_with is None
            and c.log.logging_dir is None
            and c.is_changed("log_tracker_name", "log_tracker_config", "log_prefix", "log_config")
        ),
        what="--log_tracker_name, --log_tracker_config, --log_prefix and --log_config",
        reason="without a tracker",
        fix="give --logging_dir, or --log_with wandb",
    ),
    OptionRule(
        code="hub-repository-missing",
        severity="no effect",
        options=("huggingface_repo_id", "huggingface_token", "resume_from_huggingface", *REPOSITORY_OPTIONS),
        is_broken=lambda c: (
            c.hub.huggingface_repo_id is None
            and (
                c.is_changed(*REPOSITORY_OPTIONS)
                or (c.is_changed("huggingface_token") and not c.hub.resume_from_huggingface)
            )
        ),
        what="the options of the hub",
        reason="no repository is given",
        fix="give --huggingface_repo_id",
    ),
    OptionRule(
        code="hub-states-not-saved",
        severity="no effect",
        options=("save_state_to_huggingface", "save_state", "save_state_on_train_end"),
        is_broken=lambda c: (
            c.hub.save_state_to_huggingface and not c.save.save_state and not c.save.save_state_on_train_end
        ),
        what="--save_state_to_huggingface",
        reason="no states are saved",
        fix="give --save_state or --save_state_on_train_end",
    ),
)

_NOTES = (
    OptionRule(
        code="plan-takes-precedence",
        severity="note",
        options=("plan", "debug_dataset"),
        is_broken=lambda c: c.run.plan and c.dataset.debug_dataset,
        what="--debug_dataset is ignored: --plan takes precedence",
        fix="give one of them",
    ),
    OptionRule(
        code="dry-run-ignored",
        severity="note",
        options=("plan", "debug_dataset", "dry_run"),
        is_broken=lambda c: c.run.dry_run and (c.run.plan or c.dataset.debug_dataset),
        what="--dry_run is ignored: --plan and --debug_dataset take precedence",
        fix="give one of them",
    ),
    OptionRule(
        code="adapter-file-without-metadata",
        severity="note",
        options=("save_model_as", "method"),
        is_broken=lambda c: c.run.method in ADAPTER_METHODS and c.save.save_model_as in ("ckpt", "pt"),
        what="a ckpt or pt file of an adapter cannot hold metadata: nothing in it says how it was trained",
        fix="give --save_model_as safetensors",
    ),
)

_CONFLICTS = (
    OptionRule(
        code="plan-with-output-config",
        severity="conflict",
        options=("plan", "output_config"),
        is_broken=lambda c: c.run.plan and c.run.output_config,
        what="--plan writes no file, and --output_config asks for one",
        fix="give one of them",
    ),
    OptionRule(
        code="logging-dir-missing",
        severity="conflict",
        options=("log_with", "logging_dir"),
        is_broken=lambda c: c.log.log_with in ("tensorboard", "all") and c.log.logging_dir is None,
        what="--log_with has no folder to write logs into",
        fix="give --logging_dir",
    ),
    OptionRule(
        code="hub-repository-type-unknown",
        severity="conflict",
        options=("huggingface_repo_type",),
        is_broken=lambda c: c.hub.huggingface_repo_type not in (None, "model", "dataset", "space"),
        what="--huggingface_repo_type is not a type of repository",
        fix="give model, dataset or space",
    ),
    OptionRule(
        code="hub-state-name-missing",
        severity="conflict",
        options=("resume_from_huggingface", "resume"),
        is_broken=lambda c: c.hub.resume_from_huggingface and c.save.resume is None,
        what="--resume_from_huggingface has no state to download",
        fix="give --resume user/repository/path",
    ),
)

OUTPUT_RULES = _UNUSED + _NOTES + _CONFLICTS
