"""Every rule between options: a command line that breaks it and one that does not."""

from __future__ import annotations

import pytest

from sfumato.config.rules import RULES
from sfumato.config.schema import vocabulary

ADAFACTOR = "--optimizer_type AdaFactor"
PLAIN_ADAFACTOR = (
    f"{ADAFACTOR} --max_grad_norm 0 --lr_scheduler constant_with_warmup --optimizer_args relative_step=False"
)
# name -> options that break it, options that are nearly the same and do not
CASES = {
    "variant": ("--family sd --model_type chroma", "--family chroma --model_type chroma"),
    "lora-plus-found-rate": (
        "--network_args loraplus_lr_ratio=16 --optimizer_type Prodigy --learning_rate 1",
        "--network_args loraplus_lr_ratio=16 --optimizer_type AdamW",
    ),
    "base-strengths": ("--base_weights FILE --base_weights_multiplier 1 2", "--base_weights FILE FILE"),
    "adapter-options-full": ("--method full --network_dim 4", "--method full"),
    "full-options-adapter": ("--block_lr 1e-5,0", "--method full --block_lr 1e-5,0"),
    "text-rates-twice": (
        "--method full --train_text_encoder --text_encoder_lr 1e-5 --learning_rate_te 1e-5",
        "--method full --train_text_encoder --learning_rate_te1 1e-5 --learning_rate_te 1e-6",
    ),
    "text-still": ("--method full --learning_rate_te1 1e-5", "--method full --train_text_encoder --text_encoder_lr 0"),
    "text-never": (
        "--method full --train_text_encoder --stop_text_encoder_training 0",
        "--method full --train_text_encoder --stop_text_encoder_training 1",
    ),
    "block-rates-twice": ("--method full --block_lr 0,1e-5 --unet_lr 1e-5", "--method full --block_lr 0,1e-5"),
    "adapter-folder": ("--save_model_as diffusers", "--save_model_as diffusers --method full"),
    "no-padding": ("--method full --no_token_padding", "--method full"),
    "attention-without-gradients": ("--use_sage_attn", "--use_flash_attn"),
    "begun-twice": ("--initial_epoch 2 --initial_step 30", "--initial_step 30"),
    "nothing-skipped": ("--skip_until_initial_step", "--skip_until_initial_step --initial_epoch 2"),
    "noise-twice": ("--noise_offset 0.1 --multires_noise_iterations 6", "--noise_offset 0.1"),
    "v-weight": (
        "--scale_v_pred_loss_like_noise_pred",
        "--scale_v_pred_loss_like_noise_pred --v_parameterization",
    ),
    "noise-weight": ("--v_pred_like_loss 0.5 --v_parameterization", "--v_pred_like_loss 0.5"),
    "strata-of-one": (
        "--timestep_stratified --min_timestep 500 --max_timestep 500",
        "--timestep_stratified --min_timestep 498 --max_timestep 500",
    ),
    "alone-noise_offset_random_strength": (
        "--noise_offset_random_strength",
        "--noise_offset_random_strength --noise_offset 0.1",
    ),
    "alone-adaptive_noise_scale": ("--adaptive_noise_scale 0.1", "--adaptive_noise_scale 0.1 --noise_offset 0.1"),
    "alone-multires_noise_discount": (
        "--multires_noise_discount 0.2",
        "--multires_noise_discount 0.2 --multires_noise_iterations 6",
    ),
    "alone-ip_noise_gamma_random_strength": (
        "--ip_noise_gamma_random_strength",
        "--ip_noise_gamma_random_strength --ip_noise_gamma 0.1",
    ),
    "alone-p2_k": ("--p2_k 2", "--p2_k 2 --p2_gamma 1"),
    "not-robust-huber_schedule": ("--huber_schedule constant", "--huber_schedule constant --loss_type huber"),
    "not-robust-huber_c": ("--huber_c 0.2 --loss_type l1", "--huber_c 0.2 --loss_type smooth_l1"),
    "not-robust-huber_scale": ("--huber_scale 2", "--huber_scale 2 --loss_type huber"),
    "alone-uncertainty_lr": ("--uncertainty_lr 0.1", "--uncertainty_lr 0.1 --uncertainty_weighting"),
    "two-weights": ("--uncertainty_weighting --min_snr_gamma 5", "--uncertainty_weighting --weighting_scheme mode"),
    "uncertain-rate": (
        "--uncertainty_weighting --optimizer_type Prodigy --learning_rate 1",
        "--uncertainty_weighting --optimizer_type AdamW",
    ),
    "uncertain-relative-rate": (
        f"--uncertainty_weighting --uncertainty_lr 0.1 {ADAFACTOR}",
        f"--uncertainty_weighting --uncertainty_lr 0.1 {PLAIN_ADAFACTOR}",
    ),
    "parts": ("--network_train_unet_only --network_train_text_encoder_only", "--network_train_unet_only"),
    "dim-from-weights": ("--dim_from_weights", "--dim_from_weights --network_weights FILE"),
    "cached-color": ("--color_aug --cache_latents", "--color_aug"),
    "cached-crop": ("--random_crop --cache_latents_to_disk", "--random_crop"),
    "text-cache-off": (
        "--text_cache_variants 4 --text_encoder_batch_size 2",
        "--text_cache_variants 4 --cache_text_encoder_outputs",
    ),
    "cache-check-off": ("--skip_cache_check --cache_latents", "--skip_cache_check --cache_latents_to_disk"),
    "two-optimizers": ("--use_8bit_adam --use_lion_optimizer", "--use_8bit_adam"),
    "optimizer-twice": ("--use_lion_optimizer --optimizer_type Lion", "--optimizer_type Lion"),
    "constant-warmup": ("--lr_warmup_steps 5", "--lr_warmup_steps 5 --lr_scheduler constant_with_warmup"),
    "piecewise-warmup": (
        "--lr_warmup_steps 5 --lr_scheduler piecewise_constant",
        "--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:9,0.1",
    ),
    "own-schedule-warmup": ("--lr_scheduler_type StepLR --lr_warmup_steps 5", "--lr_scheduler_type StepLR"),
    "relative-warmup": (f"{ADAFACTOR} --lr_warmup_steps 5", f"{PLAIN_ADAFACTOR} --lr_warmup_steps 5"),
    "zero-start": (
        "--optimizer_type DAdaptSGD --learning_rate 1 --lr_scheduler cosine --lr_warmup_steps 5",
        "--optimizer_type DAdaptSGD --learning_rate 1 --lr_scheduler cosine",
    ),
    "adafactor-schedule": ("--lr_scheduler adafactor", f"{ADAFACTOR} --lr_scheduler adafactor"),
    "lowest-rate": (
        "--lr_scheduler cosine_with_min_lr",
        "--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1",
    ),
    "sampler-from-noise": (
        "--zero_terminal_snr --sample_sampler k_lms",
        "--zero_terminal_snr --sample_sampler k_euler",
    ),
    "schedule-twice": ("--lr_scheduler_type StepLR --lr_scheduler cosine", "--lr_scheduler_type StepLR"),
    "schedule-free": (
        "--optimizer_type RAdamScheduleFree --lr_warmup_steps 5 --lr_scheduler polynomial --lr_scheduler_power 2",
        "--optimizer_type RAdamScheduleFree",
    ),
    "relative-schedule": (f"{ADAFACTOR} --lr_scheduler cosine", f"{ADAFACTOR} --lr_scheduler adafactor"),
    "relative-rate": (f"{ADAFACTOR} --learning_rate 1e-3 --unet_lr 1e-3", f"{ADAFACTOR} --unet_lr 0"),
    "relative-forced": (
        f"{ADAFACTOR} --optimizer_args relative_step=False warmup_init=True",
        f"{ADAFACTOR} --optimizer_args relative_step=True warmup_init=True",
    ),
    "one-rate": (
        "--optimizer_type Prodigy --learning_rate 1 --text_encoder_lr 1 0.5",
        "--optimizer_type Prodigy --learning_rate 1 --text_encoder_lr 1 0",
    ),
    "unread-lr_decay_steps": ("--lr_decay_steps 5", "--lr_decay_steps 5 --lr_scheduler warmup_stable_decay"),
    "unread-lr_scheduler_num_cycles": (
        "--lr_scheduler_num_cycles 2 --lr_scheduler cosine",
        "--lr_scheduler_num_cycles 2 --lr_scheduler cosine_with_restarts",
    ),
    "unread-lr_scheduler_power": (
        "--lr_scheduler_power 2 --lr_scheduler linear",
        "--lr_scheduler_power 2 --lr_scheduler polynomial",
    ),
    "unread-lr_scheduler_timescale": (
        "--lr_scheduler_timescale 2 --lr_scheduler_type StepLR",
        "--lr_scheduler_timescale 2 --lr_scheduler inverse_sqrt",
    ),
    "unread-lr_scheduler_min_lr_ratio": (
        "--lr_scheduler_min_lr_ratio 0.1 --lr_scheduler cosine",
        "--lr_scheduler_min_lr_ratio 0.1 --lr_scheduler cosine_with_min_lr",
    ),
    "low-rate": ("--optimizer_type DAdaptation", "--optimizer_type DAdaptation --learning_rate 1"),
    "no-fall": (
        "--lr_scheduler warmup_stable_decay",
        "--lr_scheduler warmup_stable_decay --lr_decay_steps 20%",
    ),
    "adafactor-norm": (PLAIN_ADAFACTOR.replace(" --max_grad_norm 0", ""), PLAIN_ADAFACTOR),
    "adafactor-warmup": (PLAIN_ADAFACTOR.replace("constant_with_warmup", "cosine"), PLAIN_ADAFACTOR),
    "adafactor-threshold": (f"{PLAIN_ADAFACTOR} clip_threshold=2", PLAIN_ADAFACTOR),
    "ema-schedule-free": ("--ema_decay 0.99 --optimizer_type AdamWScheduleFree", "--ema_decay 0.99"),
    "ema-off": (
        "--evaluate_with_ema --ema_on_cpu --sample_prompts FILE --sample_at_first",
        "--evaluate_with_ema --ema_on_cpu --ema_sigma_rel 0.1 --sample_prompts FILE --sample_at_first",
    ),
    "ema-not-evaluated": (
        "--evaluate_with_ema --ema_decay 0.9",
        "--evaluate_with_ema --ema_decay 0.9 --validation_split 0.1",
    ),
    "full-bf16-precision": ("--full_bf16", "--full_bf16 --mixed_precision bf16"),
    "full-bf16-schedule-free": (
        "--full_bf16 --mixed_precision bf16 --optimizer_type AdamWScheduleFree",
        "--mixed_precision bf16 --optimizer_type AdamWScheduleFree",
    ),
    "rounding-off": ("--no_stochastic_rounding", "--no_stochastic_rounding --full_bf16 --mixed_precision bf16"),
    "full-bf16-by-chance": ("--full_bf16 --mixed_precision bf16", "--mixed_precision bf16"),
    "full-bf16-to-nearest": (
        "--full_bf16 --mixed_precision bf16 --no_stochastic_rounding",
        "--full_bf16 --mixed_precision bf16",
    ),
    "log-folder": ("--log_with tensorboard", "--log_with tensorboard --logging_dir logs"),
    "bucket-range": ("--min_bucket_reso 2048", "--min_bucket_reso 1024"),
    "data-twice": ("--dataset_config FILE", "--no_strict"),
    "class-and-files": ("--dataset_class data.Mine", "--no_strict"),
    "metadata-and-folders": ("--in_json FILE --reg_data_dir .", "--in_json FILE"),
    "dim-twice": (
        "--dim_from_weights --network_weights FILE --network_dim 4",
        "--dim_from_weights --network_weights FILE",
    ),
    "text-rate": ("--network_train_unet_only --text_encoder_lr 1", "--text_encoder_lr 1"),
    "denoiser-rate": ("--network_train_text_encoder_only --unet_lr 1", "--unet_lr 1"),
    "buckets-off": ("--bucket_no_upscale", "--bucket_no_upscale --enable_bucket"),
    "wandb-off": ("--wandb_run_name x", "--wandb_run_name x --log_with wandb"),
    "no-tracker": ("--log_config", "--log_config --log_with wandb"),
    "ratio-and-epochs": ("--save_every_n_epochs 2 --save_n_epoch_ratio 2", "--save_n_epoch_ratio 2"),
    "pickled-adapter": ("--save_model_as pt", "--save_model_as ckpt --method full"),
    "hub-without-repository": ("--async_upload", "--async_upload --huggingface_repo_id me/it"),
    "hub-without-states": (
        "--save_state_to_huggingface --huggingface_repo_id me/it",
        "--save_state_to_huggingface --huggingface_repo_id me/it --save_state_on_train_end",
    ),
    "hub-type": (
        "--huggingface_repo_type banana --huggingface_repo_id me/it",
        "--huggingface_repo_type model --huggingface_repo_id me/it",
    ),
    "hub-nothing-to-resume": ("--resume_from_huggingface", "--resume_from_huggingface --resume me/it/x-state"),
    "keep-epochs": ("--save_last_n_epochs 2", "--save_last_n_epochs 2 --save_every_n_epochs 1"),
    "keep-steps": ("--save_last_n_steps 2 --save_every_n_epochs 1", "--save_last_n_steps 2 --save_every_n_steps 1"),
    "keep-states": ("--save_last_n_steps_state 2", "--save_last_n_steps_state 2 --save_state"),
    "samples-without-prompts": ("--sample_at_first", "--sample_at_first --sample_prompts FILE"),
    "prompts-unused": ("--sample_prompts FILE", "--sample_prompts FILE --sample_every_n_steps 5"),
    "samples-twice": (
        "--sample_prompts FILE --sample_every_n_steps 5 --sample_every_n_epochs 1",
        "--sample_prompts FILE --sample_every_n_steps 5 --sample_every_n_epochs 0",
    ),
}
# name -> which of the base options is left out, or what replaces them
REQUIRED = {
    "model": "--pretrained_model_name_or_path",
    "data": "--train_data_dir",
    "output": "--output_dir",
    "resolution": "--resolution",
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.txt"
    path.touch()
    return str(path)


def rule(name: str):
    return next(rule for rule in RULES if rule.name == name)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_told_when_broken_and_only_then(name, load, faults, file):
    broken, fine = (words.replace("FILE", file) for words in CASES[name])
    if rule(name).kind == "conflict":
        told = [text for text in faults(broken) if "not available yet" not in text]
        assert told == [f"{rule(name).what} — {rule(name).fix}"]
        assert not any(rule(name).what in text for text in faults(fine))
    else:
        assert load(broken).notes == (f"{rule(name).what} ({rule(name).fix})",)
        assert not any(rule(name).what in note for note in load(fine).notes)
        strict = faults(f"{broken} --strict")
        assert (f"{rule(name).what} — {rule(name).fix}" in strict) == (rule(name).kind == "no effect")


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_required(name, base, faults):
    base[:] = [word for word in base if not word.startswith(REQUIRED[name])]
    assert faults() == [f"{rule(name).what} — {rule(name).fix}"]


def test_every_rule_has_its_case_and_names_real_options():
    assert {rule.name for rule in RULES} == {*CASES, *REQUIRED}
    assert len({rule.name for rule in RULES}) == len(RULES)
    for each in RULES:
        assert set(each.options) <= set(vocabulary())


def test_epochs_go_before_steps_without_a_word(load):
    assert load("--max_train_epochs 3 --max_train_steps 10 --strict").notes == ()
