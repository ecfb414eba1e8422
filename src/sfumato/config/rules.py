"""Rules between options, as data: each with the reason and what to do."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.config.ema_rules import EMA_RULES
from sfumato.config.full_rules import FULL_RULES
from sfumato.config.loss_rules import LOSS_RULES
from sfumato.config.memory_rules import MEMORY_RULES
from sfumato.config.network_rules import NETWORK_RULES
from sfumato.config.optim_rules import OPTIM_RULES
from sfumato.config.output_rules import OUTPUT_RULES
from sfumato.config.rule import Rule
from sfumato.config.schema import Config

NEVER_FROM_NOISE = ("pndm", "lms", "heun", "dpm_2", "dpm_2_a", "dpmsingle")


def broken_rules(config: Config, suspects: set[str]) -> Iterator[Rule]:
    for rule in RULES:
        if not suspects.intersection(rule.options) and rule.broken(config):
            yield rule


def has_data(config: Config) -> bool:
    return config.changed("train_data_dir", "dataset_config", "in_json", "dataset_class")


def samples_wanted(config: Config) -> bool:
    return config.changed("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")


REQUIRED = (
    Rule(
        name="model",
        kind="required",
        options=("pretrained_model_name_or_path",),
        broken=lambda c: c.model.pretrained_model_name_or_path is None,
        what="no model to start from",
        fix="give --pretrained_model_name_or_path",
    ),
    Rule(
        name="data",
        kind="required",
        options=("train_data_dir", "dataset_config", "in_json", "dataset_class"),
        broken=lambda c: not has_data(c),
        what="no images to train on",
        fix="give --train_data_dir or --dataset_config",
    ),
    Rule(
        name="output",
        kind="required",
        options=("output_dir",),
        broken=lambda c: c.save.output_dir is None,
        what="no folder to save into",
        fix="give --output_dir",
    ),
    Rule(
        name="resolution",
        kind="required",
        options=("resolution", "train_data_dir", "in_json", "dataset_class", "dataset_config"),
        broken=lambda c: (
            (
                c.changed("dataset_class")
                or (c.changed("train_data_dir", "in_json") and c.dataset.dataset_config is None)
            )
            and c.buckets.resolution is None
        ),
        what="the images need a training size",
        fix="give --resolution, as 512 or 512,768",
    ),
)

CONFLICTS = (
    Rule(
        name="variant",
        kind="conflict",
        options=("family", "model_type"),
        broken=lambda c: (
            c.source("family") != "launcher"
            and None not in (c.run.family, c.model.model_type)
            and c.run.family != c.model.model_type
        ),
        what="--family and --model_type name two different kinds of models",
        fix="leave --model_type out",
    ),
    Rule(
        name="parts",
        kind="conflict",
        options=("network_train_unet_only", "network_train_text_encoder_only"),
        broken=lambda c: c.network.network_train_unet_only and c.network.network_train_text_encoder_only,
        what="--network_train_unet_only and --network_train_text_encoder_only leave nothing to train",
        fix="give at most one of them",
    ),
    Rule(
        name="dim-from-weights",
        kind="conflict",
        options=("dim_from_weights", "network_weights"),
        broken=lambda c: c.network.dim_from_weights and c.network.network_weights is None,
        what="--dim_from_weights has no file to take ranks from",
        fix="give --network_weights",
    ),
    Rule(
        name="sampler-from-noise",
        kind="conflict",
        options=("zero_terminal_snr", "sample_sampler"),
        broken=lambda c: c.noise.zero_terminal_snr and c.samples.sample_sampler.removeprefix("k_") in NEVER_FROM_NOISE,
        what="the sampler of --sample_sampler cannot start where --zero_terminal_snr leaves nothing of the picture",
        fix="--sample_sampler ddim, or euler, euler_a, dpmsolver, dpmsolver++",
    ),
    Rule(
        name="cached-color",
        kind="conflict",
        options=("color_aug", "cache_latents", "cache_latents_to_disk", "dataset_config"),
        broken=lambda c: c.images.color_aug and c.cache.cache_latents and c.dataset.dataset_config is None,
        what="--color_aug changes the picture at every step, and --cache_latents encodes it once",
        fix="leave one of them out",
    ),
    Rule(
        name="cached-crop",
        kind="conflict",
        options=("random_crop", "cache_latents", "cache_latents_to_disk", "dataset_config"),
        broken=lambda c: c.images.random_crop and c.cache.cache_latents and c.dataset.dataset_config is None,
        what="--random_crop changes the picture at every step, and --cache_latents encodes it once",
        fix="leave one of them out",
    ),
    Rule(
        name="bucket-range",
        kind="conflict",
        options=("min_bucket_reso", "max_bucket_reso"),
        broken=lambda c: c.buckets.min_bucket_reso > c.buckets.max_bucket_reso,
        what="--min_bucket_reso is above --max_bucket_reso",
        fix="exchange the two",
    ),
)

NO_EFFECT = (
    Rule(
        name="data-twice",
        kind="no effect",
        options=("dataset_config", "train_data_dir", "reg_data_dir", "in_json"),
        broken=lambda c: (
            c.dataset.dataset_config is not None and c.changed("train_data_dir", "reg_data_dir", "in_json")
        ),
        what="--train_data_dir, --reg_data_dir and --in_json have no effect: --dataset_config names the images",
        fix="leave them out",
    ),
    Rule(
        name="class-and-files",
        kind="no effect",
        options=("dataset_class", "dataset_config", "train_data_dir", "reg_data_dir", "in_json"),
        broken=lambda c: (
            c.dataset.dataset_class is not None
            and c.changed("dataset_config", "train_data_dir", "reg_data_dir", "in_json")
        ),
        what="--dataset_config, --train_data_dir, --reg_data_dir and --in_json have no effect: "
        "--dataset_class yields the images",
        fix="leave them out",
    ),
    Rule(
        name="metadata-and-folders",
        kind="no effect",
        options=("in_json", "reg_data_dir", "dataset_config", "dataset_class"),
        broken=lambda c: (
            c.changed("in_json") and c.changed("reg_data_dir") and not c.changed("dataset_config", "dataset_class")
        ),
        what="--reg_data_dir has no effect beside --in_json",
        fix="describe both in the file of --dataset_config",
    ),
    Rule(
        name="dim-twice",
        kind="no effect",
        options=("dim_from_weights", "network_dim", "network_alpha"),
        broken=lambda c: c.network.dim_from_weights and c.changed("network_dim", "network_alpha"),
        what="--network_dim and --network_alpha have no effect: --dim_from_weights takes them from the file",
        fix="leave them out",
    ),
    Rule(
        name="text-rate",
        kind="no effect",
        options=("text_encoder_lr", "network_train_unet_only"),
        broken=lambda c: c.network.network_train_unet_only and c.changed("text_encoder_lr"),
        what="--text_encoder_lr has no effect: --network_train_unet_only leaves the text encoders as they are",
        fix="leave it out",
    ),
    Rule(
        name="denoiser-rate",
        kind="no effect",
        options=("unet_lr", "network_train_text_encoder_only"),
        broken=lambda c: c.network.network_train_text_encoder_only and c.changed("unet_lr"),
        what="--unet_lr has no effect: --network_train_text_encoder_only leaves the denoiser as it is",
        fix="leave it out",
    ),
    Rule(
        name="buckets-off",
        kind="no effect",
        options=("enable_bucket", "bucket_no_upscale", "dataset_config"),
        broken=lambda c: (
            c.dataset.dataset_config is None and not c.buckets.enable_bucket and c.buckets.bucket_no_upscale
        ),
        what="--bucket_no_upscale has no effect without --enable_bucket",
        fix="give --enable_bucket",
    ),
    Rule(
        name="keep-epochs",
        kind="no effect",
        options=("save_last_n_epochs", "save_every_n_epochs", "save_n_epoch_ratio"),
        broken=lambda c: c.changed("save_last_n_epochs") and not c.changed("save_every_n_epochs", "save_n_epoch_ratio"),
        what="--save_last_n_epochs has no effect: nothing is saved by epochs",
        fix="give --save_every_n_epochs",
    ),
    Rule(
        name="keep-steps",
        kind="no effect",
        options=("save_last_n_steps", "save_every_n_steps"),
        broken=lambda c: c.changed("save_last_n_steps") and not c.changed("save_every_n_steps"),
        what="--save_last_n_steps has no effect: nothing is saved by steps",
        fix="give --save_every_n_steps",
    ),
    Rule(
        name="keep-states",
        kind="no effect",
        options=("save_last_n_epochs_state", "save_last_n_steps_state", "save_state"),
        broken=lambda c: c.changed("save_last_n_epochs_state", "save_last_n_steps_state") and not c.save.save_state,
        what="--save_last_n_epochs_state and --save_last_n_steps_state have no effect without --save_state",
        fix="give --save_state",
    ),
    Rule(
        name="text-cache-off",
        kind="no effect",
        options=("cache_text_encoder_outputs", "text_cache_variants", "text_encoder_batch_size"),
        broken=lambda c: (
            not c.cache.cache_text_encoder_outputs and c.changed("text_cache_variants", "text_encoder_batch_size")
        ),
        what="--text_cache_variants and --text_encoder_batch_size have no effect: no text is cached",
        fix="give --cache_text_encoder_outputs",
    ),
    Rule(
        name="cache-check-off",
        kind="no effect",
        options=("skip_cache_check", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"),
        broken=lambda c: (
            c.cache.skip_cache_check
            and not (c.cache.cache_latents_to_disk or c.cache.cache_text_encoder_outputs_to_disk)
        ),
        what="--skip_cache_check has no effect: nothing is cached on disk",
        fix="leave it out",
    ),
    Rule(
        name="begun-twice",
        kind="no effect",
        options=("initial_epoch", "initial_step"),
        broken=lambda c: c.loop.initial_epoch is not None and c.loop.initial_step is not None,
        what="--initial_epoch has no effect: --initial_step goes before it",
        fix="give one of them",
    ),
    Rule(
        name="nothing-skipped",
        kind="no effect",
        options=("skip_until_initial_step", "initial_epoch", "initial_step"),
        broken=lambda c: c.loop.skip_until_initial_step and not c.changed("initial_epoch", "initial_step"),
        what="--skip_until_initial_step has no effect without --initial_step or --initial_epoch; a run that is resumed "
        "always goes on with its own data",
        fix="leave it out, or give --initial_step",
    ),
    Rule(
        name="samples-without-prompts",
        kind="no effect",
        options=("sample_prompts", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
        broken=lambda c: samples_wanted(c) and c.samples.sample_prompts is None,
        what="samples are asked for, but there are no prompts",
        fix="give --sample_prompts",
    ),
    Rule(
        name="prompts-unused",
        kind="no effect",
        options=("sample_prompts", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
        broken=lambda c: c.samples.sample_prompts is not None and not samples_wanted(c),
        what="--sample_prompts has no effect: no moment for samples is given",
        fix="give --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first",
    ),
    Rule(
        name="samples-twice",
        kind="no effect",
        options=("sample_every_n_steps", "sample_every_n_epochs"),
        broken=lambda c: c.samples.sample_every_n_steps is not None and c.samples.sample_every_n_epochs is not None,
        what="--sample_every_n_steps has no effect: --sample_every_n_epochs goes before it",
        fix="give one of them",
    ),
)

RULES = (
    *(REQUIRED + CONFLICTS + NO_EFFECT + LOSS_RULES + OPTIM_RULES),
    *(NETWORK_RULES + FULL_RULES + OUTPUT_RULES + EMA_RULES + MEMORY_RULES),
)
