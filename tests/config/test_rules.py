"""Every rule between options: a command line that breaks it and one that does not."""

from __future__ import annotations

from collections import Counter

import pytest

from sfumato.config.option_rule import OptionRule
from sfumato.config.rules import RULES
from sfumato.config.schema import vocabulary

ADAFACTOR = "--optimizer_type AdaFactor"
PLAIN_ADAFACTOR = (
    f"{ADAFACTOR} --max_grad_norm 0 --lr_scheduler constant_with_warmup --optimizer_args relative_step=False"
)
CPU_ADAM = "deepspeed.ops.adam.DeepSpeedCPUAdam"
HALF_MASTERS = "--deepspeed --fp16_master_weights_and_gradients --mixed_precision fp16 --offload_optimizer_device cpu"
# code, or code and option where several rules share it -> options that break it, similar ones that do not
CASES = {
    "fsdp-with-deepspeed": ("--fsdp --deepspeed", "--deepspeed"),
    "fsdp-offload-without-fsdp": ("--fsdp_offload_params", "--fsdp --fsdp_offload_params"),
    "zero-options-without-deepspeed": ("--zero_stage 3", "--deepspeed --zero_stage 3"),
    "zero-stage-shares-nothing": ("--deepspeed --zero_stage 0", "--deepspeed --zero_stage 1"),
    "param-offload-below-stage-3": (
        "--deepspeed --offload_param_device cpu",
        "--deepspeed --zero_stage 3 --offload_param_device cpu",
    ),
    "nvme-path-missing": (
        "--deepspeed --offload_optimizer_device nvme",
        "--deepspeed --offload_optimizer_device nvme --offload_optimizer_nvme_path PATH",
    ),
    "half-masters-need-cpu-adam": (
        f"{HALF_MASTERS} --optimizer_type AdamW",
        f"{HALF_MASTERS} --optimizer_type {CPU_ADAM}",
    ),
    "family-and-model-type-differ": ("--family sd --model_type chroma", "--family chroma --model_type chroma"),
    "lora-plus-with-single-lr": (
        "--network_args loraplus_lr_ratio=16 --optimizer_type Prodigy --learning_rate 1",
        "--network_args loraplus_lr_ratio=16 --optimizer_type AdamW",
    ),
    "base-weights-multiplier-count": ("--base_weights FILE --base_weights_multiplier 1 2", "--base_weights FILE FILE"),
    "adapter-options-in-full-training": ("--method full --network_dim 4", "--method full"),
    "extract-without-full-training": ("--extract_lora_at_end 4", "--method full --extract_lora_at_end 4"),
    "full-options-in-adapter-training": ("--block_lr 1e-5,0", "--method full --block_lr 1e-5,0"),
    "full-fp16-without-fp16-precision": ("--full_fp16", "--full_fp16 --mixed_precision fp16"),
    "full-fp16-with-ggpo": (
        "--full_fp16 --mixed_precision fp16 --network_args ggpo_sigma=0.03 ggpo_beta=0.01",
        "--mixed_precision fp16 --network_args ggpo_sigma=0.03 ggpo_beta=0.01",
    ),
    "full-fp16-rounding": ("--full_fp16 --mixed_precision fp16", "--mixed_precision fp16"),
    "masked-input-in-latents": (
        "--method lllite --lllite_inpaint_masked_input --lllite_cond_in_channels 4 --lllite_cond_input latent",
        "--method lllite --lllite_cond_in_channels 4 --lllite_cond_input latent",
    ),
    "masked-input-without-mask": (
        "--method lllite --lllite_inpaint_masked_input",
        "--method lllite --lllite_inpaint_masked_input --lllite_cond_in_channels 4",
    ),
    "lllite-options-unused": ("--cond_emb_dim 16", "--method lllite --cond_emb_dim 16 --lllite_use_aspp"),
    "control-net-options-unused": ("--control_net_lr 1e-5", "--method control_net --control_net_lr 1e-5"),
    "learning-rate-before-control-net-lr": (
        "--method control_net --control_net_lr 1e-5 --learning_rate 1e-4",
        "--method control_net --learning_rate 1e-4",
    ),
    "other-lr-in-control-net-training": ("--method control_net --unet_lr 1e-4", "--unet_lr 1e-4"),
    "masked-loss-of-control-images": (
        "--method control_net --masked_loss",
        "--method control_net --masked_loss --alpha_mask",
    ),
    "text-encoder-lr-twice": (
        "--method full --train_text_encoder --text_encoder_lr 1e-5 --learning_rate_te 1e-5",
        "--method full --train_text_encoder --learning_rate_te1 1e-5 --learning_rate_te 1e-6",
    ),
    "text-encoder-not-trained": (
        "--method full --learning_rate_te1 1e-5",
        "--method full --train_text_encoder --text_encoder_lr 0",
    ),
    "text-encoder-stopped-at-start": (
        "--method full --train_text_encoder --stop_text_encoder_training 0",
        "--method full --train_text_encoder --stop_text_encoder_training 1",
    ),
    "block-lr-with-unet-lr": ("--method full --block_lr 0,1e-5 --unet_lr 1e-5", "--method full --block_lr 0,1e-5"),
    "adapter-as-folder": ("--save_model_as diffusers", "--save_model_as diffusers --method full"),
    "ggpo-with-fused-backward": (
        "--network_args ggpo_sigma=0.03 ggpo_beta=0.01 --fused_backward_pass",
        "--network_args ggpo_sigma=0.03 ggpo_beta=0.01",
    ),
    "fused-backward-given-twice": (
        "--method full --fused_backward_pass --fused_optimizer_groups 2",
        "--method full --fused_backward_pass",
    ),
    "fused-backward-accumulation": (
        "--method full --fused_backward_pass --gradient_accumulation_steps 2",
        "--method full --gradient_accumulation_steps 2",
    ),
    "fused-backward-fp16": (
        "--method full --fused_backward_pass --mixed_precision fp16",
        "--method full --fused_backward_pass --mixed_precision bf16",
    ),
    "full-training-swap-without-fused-backward": (
        "--method full --blocks_to_swap 2",
        "--method full --blocks_to_swap 2 --fused_backward_pass",
    ),
    "text-encoder-swap-without-cache": (
        "--text_encoder_blocks_to_swap 2",
        "--text_encoder_blocks_to_swap 2 --cache_text_encoder_outputs --network_train_unet_only",
    ),
    "streaming-without-swap": ("--stream_blocks", "--stream_blocks --blocks_to_swap 2"),
    "streaming-of-trained-blocks": (
        "--method full --blocks_to_swap 2 --fused_backward_pass --stream_blocks",
        "--blocks_to_swap 2 --stream_blocks",
    ),
    "older-swap-options-unused": ("--blocks_to_swap 2 --double_blocks_to_swap 1", "--double_blocks_to_swap 1"),
    "prompts-file-missing": ("--method leco", "--method leco --prompts_file FILE"),
    "prompts-file-without-leco": ("--prompts_file FILE", "--method leco --prompts_file FILE"),
    "leco-text-encoder-only": (
        "--method leco --prompts_file FILE --network_train_text_encoder_only",
        "--method leco --prompts_file FILE",
    ),
    "slider-reference-dropout": ("--method image_slider --reference_dropout_rate 0.1", "--method image_slider"),
    "leco-options-unused": ("--method leco --prompts_file FILE", "--no_strict"),
    "token-string-missing": ("--method textual_inversion", "--method textual_inversion --token_string zwx"),
    "token-string-with-other-method": ("--method full --token_string zwx", "--token_string zwx"),
    "token-string-counts-differ": (
        "--token_string zwx --init_word oil painting",
        "--token_string zwx yqv --init_word oil painting --num_vectors_per_token 2",
    ),
    "two-templates": (
        "--token_string zwx --use_object_template --use_style_template",
        "--token_string zwx --use_style_template",
    ),
    "embedding-options-without-token-string": ("--init_word cat", "--token_string zwx --init_word cat"),
    "init-word-unused": ("--token_string zwx --init_word cat --weights FILE", "--token_string zwx --weights FILE"),
    "learning-rates-in-textual-inversion": (
        "--method textual_inversion --token_string zwx --text_encoder_lr 1e-3",
        "--method textual_inversion --token_string zwx --embedding_lr 1e-3",
    ),
    "t5-without-text-encoders": (
        "--method full --train_t5xxl",
        "--method full --train_t5xxl --train_text_encoder",
    ),
    "captions-without-padding": ("--method full --no_token_padding", "--method full"),
    "base-formats-conflict": ("--fp8_base --nf4_base", "--fp8_base --fp8_scaled"),
    "scaled-format-with-compute": ("--fp8_scaled --fp8_compute", "--fp8_base --fp8_compute"),
    "rotation-without-int8": ("--fp8_scaled --rotate_inputs", "--int8_base --rotate_inputs"),
    "low-precision-in-full-training": ("--method full --fp8_base_unet", "--method full --fp8_base"),
    "sage-attention-without-gradients": ("--attention sage", "--use_flash_attn"),
    "attention-takes-precedence": ("--attention sdpa --xformers", "--attention sdpa --sdpa"),
    "initial-step-takes-precedence": ("--initial_epoch 2 --initial_step 30", "--initial_step 30"),
    "skip-without-initial-step": ("--skip_until_initial_step", "--skip_until_initial_step --initial_epoch 2"),
    "epochs-take-precedence": ("--max_train_epochs 1 --max_train_steps 1600", "--max_train_epochs 1"),
    "timestep-range-reversed": (
        "--min_timestep 900 --max_timestep 100",
        "--min_timestep 100 --max_timestep 100",
    ),
    "stratified-single-timestep": (
        "--timestep_stratified --min_timestep 500 --max_timestep 500",
        "--timestep_stratified --min_timestep 498 --max_timestep 500",
    ),
    "parent-option-missing noise_offset_random_strength": (
        "--noise_offset_random_strength",
        "--noise_offset_random_strength --noise_offset 0.1",
    ),
    "parent-option-missing adaptive_noise_scale": (
        "--adaptive_noise_scale 0.1",
        "--adaptive_noise_scale 0.1 --noise_offset 0.1",
    ),
    "parent-option-missing multires_noise_discount": (
        "--multires_noise_discount 0.2",
        "--multires_noise_discount 0.2 --multires_noise_iterations 6",
    ),
    "parent-option-missing ip_noise_gamma_random_strength": (
        "--ip_noise_gamma_random_strength",
        "--ip_noise_gamma_random_strength --ip_noise_gamma 0.1",
    ),
    "parent-option-missing p2_k": ("--p2_k 2", "--p2_k 2 --p2_gamma 1"),
    "huber-option-unused huber_schedule": ("--huber_schedule constant", "--huber_schedule constant --loss_type huber"),
    "huber-option-unused huber_c": ("--huber_c 0.2 --loss_type l1", "--huber_c 0.2 --loss_type smooth_l1"),
    "huber-option-unused huber_scale": ("--huber_scale 2", "--huber_scale 2 --loss_type huber"),
    "parent-option-missing uncertainty_lr": ("--uncertainty_lr 0.1", "--uncertainty_lr 0.1 --uncertainty_weighting"),
    "uncertainty-with-loss-weights": (
        "--uncertainty_weighting --min_snr_gamma 5",
        "--uncertainty_weighting --weighting_scheme mode",
    ),
    "uncertainty-with-single-lr": (
        "--uncertainty_weighting --optimizer_type Prodigy --learning_rate 1",
        "--uncertainty_weighting --optimizer_type AdamW",
    ),
    "uncertainty-lr-unused": (
        f"--uncertainty_weighting --uncertainty_lr 0.1 {ADAFACTOR}",
        f"--uncertainty_weighting --uncertainty_lr 0.1 {PLAIN_ADAFACTOR}",
    ),
    "train-only-conflict": ("--network_train_unet_only --network_train_text_encoder_only", "--network_train_unet_only"),
    "dim-from-weights-without-file": ("--dim_from_weights", "--dim_from_weights --network_weights FILE"),
    "color-aug-with-cached-latents": ("--color_aug --cache_latents", "--color_aug"),
    "random-crop-with-cached-latents": ("--random_crop --cache_latents_to_disk", "--random_crop"),
    "text-cache-disabled": (
        "--text_cache_variants 4 --text_encoder_batch_size 2",
        "--text_cache_variants 4 --cache_text_encoder_outputs",
    ),
    "disk-cache-disabled": ("--skip_cache_check --cache_latents", "--skip_cache_check --cache_latents_to_disk"),
    "compile-options-without-compile": ("--compile_dynamic false", "--compile --compile_dynamic false"),
    "compile-mode-unused": (
        "--compile --dynamo_backend aot_eager --compile_mode max-autotune",
        "--torch_compile --dynamo_backend inductor --compile_mode max-autotune",
    ),
    "optimizer-switches-conflict": ("--use_8bit_adam --use_lion_optimizer", "--use_8bit_adam"),
    "optimizer-given-twice": ("--use_lion_optimizer --optimizer_type Lion", "--optimizer_type Lion"),
    "warmup-with-constant-schedule": ("--lr_warmup_steps 5", "--lr_warmup_steps 5 --lr_scheduler constant_with_warmup"),
    "warmup-with-piecewise-schedule": (
        "--lr_warmup_steps 5 --lr_scheduler piecewise_constant",
        "--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:9,0.1",
    ),
    "warmup-with-scheduler-type": ("--lr_scheduler_type StepLR --lr_warmup_steps 5", "--lr_scheduler_type StepLR"),
    "warmup-with-relative-step": (f"{ADAFACTOR} --lr_warmup_steps 5", f"{PLAIN_ADAFACTOR} --lr_warmup_steps 5"),
    "warmup-with-dadaptsgd": (
        "--optimizer_type DAdaptSGD --learning_rate 1 --lr_scheduler cosine --lr_warmup_steps 5",
        "--optimizer_type DAdaptSGD --learning_rate 1 --lr_scheduler cosine",
    ),
    "adafactor-schedule-without-relative-step": ("--lr_scheduler adafactor", f"{ADAFACTOR} --lr_scheduler adafactor"),
    "min-lr-ratio-missing": (
        "--lr_scheduler cosine_with_min_lr",
        "--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1",
    ),
    "scheduler-type-takes-precedence": (
        "--lr_scheduler_type StepLR --lr_scheduler cosine",
        "--lr_scheduler_type StepLR",
    ),
    "schedule-with-schedule-free": (
        "--optimizer_type RAdamScheduleFree --lr_warmup_steps 5 --lr_scheduler polynomial --lr_scheduler_power 2",
        "--optimizer_type RAdamScheduleFree",
    ),
    "schedule-with-relative-step": (f"{ADAFACTOR} --lr_scheduler cosine", f"{ADAFACTOR} --lr_scheduler adafactor"),
    "lr-with-relative-step": (f"{ADAFACTOR} --learning_rate 1e-3 --unet_lr 1e-3", f"{ADAFACTOR} --unet_lr 0"),
    "relative-step-forced": (
        f"{ADAFACTOR} --optimizer_args relative_step=False warmup_init=True",
        f"{ADAFACTOR} --optimizer_args relative_step=True warmup_init=True",
    ),
    "single-lr-optimizer": (
        "--optimizer_type Prodigy --learning_rate 1 --text_encoder_lr 1 0.5",
        "--optimizer_type Prodigy --learning_rate 1 --text_encoder_lr 1 0",
    ),
    "schedule-option-unused lr_decay_steps": (
        "--lr_decay_steps 5",
        "--lr_decay_steps 5 --lr_scheduler warmup_stable_decay",
    ),
    "schedule-option-unused lr_scheduler_num_cycles": (
        "--lr_scheduler_num_cycles 2 --lr_scheduler cosine",
        "--lr_scheduler_num_cycles 2 --lr_scheduler cosine_with_restarts",
    ),
    "schedule-option-unused lr_scheduler_power": (
        "--lr_scheduler_power 2 --lr_scheduler linear",
        "--lr_scheduler_power 2 --lr_scheduler polynomial",
    ),
    "schedule-option-unused lr_scheduler_timescale": (
        "--lr_scheduler_timescale 2 --lr_scheduler_type StepLR",
        "--lr_scheduler_timescale 2 --lr_scheduler inverse_sqrt",
    ),
    "schedule-option-unused lr_scheduler_min_lr_ratio": (
        "--lr_scheduler_min_lr_ratio 0.1 --lr_scheduler cosine",
        "--lr_scheduler_min_lr_ratio 0.1 --lr_scheduler cosine_with_min_lr",
    ),
    "low-lr-multiplier": ("--optimizer_type DAdaptation", "--optimizer_type DAdaptation --learning_rate 1"),
    "decay-steps-missing": (
        "--lr_scheduler warmup_stable_decay",
        "--lr_scheduler warmup_stable_decay --lr_decay_steps 20%",
    ),
    "adafactor-grad-norm": (PLAIN_ADAFACTOR.replace(" --max_grad_norm 0", ""), PLAIN_ADAFACTOR),
    "adafactor-without-warmup": (PLAIN_ADAFACTOR.replace("constant_with_warmup", "cosine"), PLAIN_ADAFACTOR),
    "adafactor-clip-threshold": (f"{PLAIN_ADAFACTOR} clip_threshold=2", PLAIN_ADAFACTOR),
    "ema-with-schedule-free": ("--ema_decay 0.99 --optimizer_type AdamWScheduleFree", "--ema_decay 0.99"),
    "ema-disabled": (
        "--evaluate_with_ema --ema_on_cpu --sample_prompts FILE --sample_at_first",
        "--evaluate_with_ema --ema_on_cpu --ema_sigma_rel 0.1 --sample_prompts FILE --sample_at_first",
    ),
    "ema-not-evaluated": (
        "--evaluate_with_ema --ema_decay 0.9",
        "--evaluate_with_ema --ema_decay 0.9 --validation_split 0.1",
    ),
    "full-bf16-without-bf16-precision": ("--full_bf16", "--full_bf16 --mixed_precision bf16"),
    "stochastic-rounding-unused": (
        "--no_stochastic_rounding",
        "--no_stochastic_rounding --full_bf16 --mixed_precision bf16",
    ),
    "full-bf16-stochastic-rounding": ("--full_bf16 --mixed_precision bf16", "--mixed_precision bf16"),
    "full-bf16-nearest-rounding": (
        "--full_bf16 --mixed_precision bf16 --no_stochastic_rounding",
        "--full_bf16 --mixed_precision bf16",
    ),
    "dry-run-ignored": ("--dry_run --plan", "--dry_run"),
    "plan-takes-precedence": ("--plan --debug_dataset", "--plan"),
    "plan-with-output-config": ("--plan --output_config --config_file new.toml", "--plan"),
    "logging-dir-missing": ("--log_with tensorboard", "--log_with tensorboard --logging_dir logs"),
    "bucket-range-reversed": ("--min_bucket_reso 2048", "--min_bucket_reso 1024"),
    "dataset-config-takes-precedence": ("--dataset_config FILE", "--no_strict"),
    "dataset-class-takes-precedence": ("--dataset_class data.Mine", "--no_strict"),
    "reg-folder-with-metadata-file": ("--in_json FILE --reg_data_dir .", "--in_json FILE"),
    "dim-from-weights-takes-precedence": (
        "--dim_from_weights --network_weights FILE --network_dim 4",
        "--dim_from_weights --network_weights FILE",
    ),
    "text-encoder-lr-unused": ("--network_train_unet_only --text_encoder_lr 1", "--text_encoder_lr 1"),
    "unet-lr-unused": ("--network_train_text_encoder_only --unet_lr 1", "--unet_lr 1"),
    "buckets-disabled": ("--bucket_no_upscale", "--bucket_no_upscale --enable_bucket"),
    "wandb-disabled": ("--wandb_run_name x", "--wandb_run_name x --log_with wandb"),
    "tracker-missing": ("--log_config", "--log_config --log_with wandb"),
    "save-ratio-takes-precedence": ("--save_every_n_epochs 2 --save_n_epoch_ratio 2", "--save_n_epoch_ratio 2"),
    "adapter-file-without-metadata": ("--save_model_as pt", "--save_model_as ckpt --method full"),
    "hub-repository-missing": ("--async_upload", "--async_upload --huggingface_repo_id me/it"),
    "hub-states-not-saved": (
        "--save_state_to_huggingface --huggingface_repo_id me/it",
        "--save_state_to_huggingface --huggingface_repo_id me/it --save_state_on_train_end",
    ),
    "hub-repository-type-unknown": (
        "--huggingface_repo_type banana --huggingface_repo_id me/it",
        "--huggingface_repo_type model --huggingface_repo_id me/it",
    ),
    "hub-state-name-missing": ("--resume_from_huggingface", "--resume_from_huggingface --resume me/it/x-state"),
    "keep-epochs-unused": ("--save_last_n_epochs 2", "--save_last_n_epochs 2 --save_every_n_epochs 1"),
    "keep-steps-unused": (
        "--save_last_n_steps 2 --save_every_n_epochs 1",
        "--save_last_n_steps 2 --save_every_n_steps 1",
    ),
    "keep-states-unused": ("--save_last_n_steps_state 2", "--save_last_n_steps_state 2 --save_state"),
    "sample-prompts-missing": ("--sample_at_first", "--sample_at_first --sample_prompts FILE"),
    "sample-prompts-unused": ("--sample_prompts FILE", "--sample_prompts FILE --sample_every_n_steps 5"),
    "sample-epochs-take-precedence": (
        "--sample_prompts FILE --sample_every_n_steps 5 --sample_every_n_epochs 1",
        "--sample_prompts FILE --sample_every_n_steps 5 --sample_every_n_epochs 0",
    ),
}
# code -> which of the base options is missing
REQUIRED = {
    "model-missing": "--pretrained_model_name_or_path",
    "data-missing": "--train_data_dir",
    "output-missing": "--output_dir",
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.txt"
    path.touch()
    return str(path)


def find_rule(name: str) -> OptionRule:
    code, _, option = name.partition(" ")
    return next(rule for rule in RULES if rule.code == code and option in ("", rule.options[0]))


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_reported_when_broken_and_only_then(name, load, codes_of, file):
    broken, fine = (words.replace("FILE", file) for words in CASES[name])
    rule = find_rule(name)
    if rule.severity == "conflict":
        assert codes_of(broken) == [rule.code]
        assert rule.code not in codes_of(fine)
    else:
        shown = f"{rule.what} ({rule.reason or rule.fix})"
        idle = rule.severity == "no effect"
        assert load(broken).notes == (f"no effect in this run: {shown}" if idle else shown,)
        assert not any(shown in note for note in load(fine).notes)
        assert (rule.code in codes_of(f"{broken} --strict")) == (rule.severity == "no effect")


@pytest.mark.parametrize("code", REQUIRED)
def test_what_is_required(code, base, codes_of):
    base[:] = [word for word in base if not word.startswith(REQUIRED[code])]
    assert codes_of() == [code]


def test_every_rule_has_its_case_and_names_real_options():
    counts = Counter(rule.code for rule in RULES)
    names = [rule.code if counts[rule.code] == 1 else f"{rule.code} {rule.options[0]}" for rule in RULES]
    assert sorted(names) == sorted([*CASES, *REQUIRED])
    for rule in RULES:
        assert set(rule.options) <= set(vocabulary())
