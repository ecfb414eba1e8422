"""Rules between the options of the dataset, of image changes and of caches."""

from __future__ import annotations

from sfumato.config.option_rule import OptionRule

_CONFLICTS = (
    OptionRule(
        code="color-aug-with-cached-latents",
        severity="conflict",
        options=("color_aug", "cache_latents", "cache_latents_to_disk", "dataset_config"),
        is_broken=lambda c: c.images.color_aug and c.cache.cache_latents and c.dataset.dataset_config is None,
        what="--color_aug changes each image at every step, but --cache_latents encodes it once",
        fix="remove one of them",
    ),
    OptionRule(
        code="random-crop-with-cached-latents",
        severity="conflict",
        options=("random_crop", "cache_latents", "cache_latents_to_disk", "dataset_config"),
        is_broken=lambda c: c.images.random_crop and c.cache.cache_latents and c.dataset.dataset_config is None,
        what="--random_crop changes each image at every step, but --cache_latents encodes it once",
        fix="remove one of them",
    ),
    OptionRule(
        code="bucket-range-reversed",
        severity="conflict",
        options=("min_bucket_reso", "max_bucket_reso"),
        is_broken=lambda c: c.buckets.min_bucket_reso > c.buckets.max_bucket_reso,
        what="--min_bucket_reso is above --max_bucket_reso",
        fix="swap the two values",
    ),
)

_UNUSED = (
    OptionRule(
        code="dataset-config-takes-precedence",
        severity="no effect",
        options=("dataset_config", "train_data_dir", "reg_data_dir", "in_json"),
        is_broken=lambda c: (
            c.dataset.dataset_config is not None and c.is_changed("train_data_dir", "reg_data_dir", "in_json")
        ),
        what="--train_data_dir, --reg_data_dir and --in_json",
        reason="--dataset_config takes precedence",
        fix="remove them",
    ),
    OptionRule(
        code="dataset-class-takes-precedence",
        severity="no effect",
        options=("dataset_class", "dataset_config", "train_data_dir", "reg_data_dir", "in_json"),
        is_broken=lambda c: (
            c.dataset.dataset_class is not None
            and c.is_changed("dataset_config", "train_data_dir", "reg_data_dir", "in_json")
        ),
        what="--dataset_config, --train_data_dir, --reg_data_dir and --in_json",
        reason="--dataset_class takes precedence",
        fix="remove them",
    ),
    OptionRule(
        code="reg-folder-with-metadata-file",
        severity="no effect",
        options=("in_json", "reg_data_dir", "dataset_config", "dataset_class"),
        is_broken=lambda c: (
            c.is_changed("in_json")
            and c.is_changed("reg_data_dir")
            and not c.is_changed("dataset_config", "dataset_class")
        ),
        what="--reg_data_dir",
        reason="with --in_json",
        fix="describe both in the file of --dataset_config",
    ),
    OptionRule(
        code="buckets-disabled",
        severity="no effect",
        options=("enable_bucket", "bucket_no_upscale", "dataset_config"),
        is_broken=lambda c: (
            c.dataset.dataset_config is None and not c.buckets.enable_bucket and c.buckets.bucket_no_upscale
        ),
        what="--bucket_no_upscale",
        reason="without --enable_bucket",
        fix="give --enable_bucket",
    ),
    OptionRule(
        code="text-cache-disabled",
        severity="no effect",
        options=("cache_text_encoder_outputs", "text_cache_variants", "text_encoder_batch_size"),
        is_broken=lambda c: (
            not c.cache.cache_text_encoder_outputs and c.is_changed("text_cache_variants", "text_encoder_batch_size")
        ),
        what="--text_cache_variants and --text_encoder_batch_size",
        reason="text encoder outputs are not cached",
        fix="give --cache_text_encoder_outputs",
    ),
    OptionRule(
        code="disk-cache-disabled",
        severity="no effect",
        options=("skip_cache_check", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"),
        is_broken=lambda c: (
            c.cache.skip_cache_check
            and not (c.cache.cache_latents_to_disk or c.cache.cache_text_encoder_outputs_to_disk)
        ),
        what="--skip_cache_check",
        reason="nothing is cached on disk",
        fix="remove it",
    ),
)

DATA_RULES = _CONFLICTS + _UNUSED
