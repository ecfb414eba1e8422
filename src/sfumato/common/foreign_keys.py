"""Keys of other programs that stand in configuration files beside options of sd-scripts: pure data, by kind."""

from __future__ import annotations

from functools import cache

FRONT_END = "of a front end or accelerate"
NETWORK_ARGUMENT = "only in network_args"
DATASET_KEY = "only in the file of dataset_config"
OTHER_SCRIPT = "of other scripts"

FOREIGN_KEYS: dict[str, tuple[str, ...]] = {  # kind -> keys
    FRONT_END: (
        # arguments of accelerate's launcher
        "num_cpu_threads_per_process", "num_processes", "num_machines", "machine_rank", "multi_gpu", "gpu_ids",
        "main_process_port", "main_process_ip", "dynamo_mode", "dynamo_use_fullgraph", "dynamo_use_dynamic",
        "extra_accelerate_launch_args", "downcast_bf16", "use_cpu", "distributed_type", "enable_cpu_affinity",
        # the window of kohya_ss
        "LoRA_type", "LyCORIS_preset", "additional_parameters", "caption_metadata_filename",
        "create_buckets", "create_caption", "epoch", "flux1_cache_text_encoder_outputs",
        "flux1_cache_text_encoder_outputs_to_disk", "flux1_checkbox", "flux1_clip_l", "flux1_t5xxl",
        "flux_fused_backward_pass", "full_path", "headless", "hunyuan_image_checkbox", "image_folder",
        "latent_metadata_filename", "lora_network_weights", "lowvram", "lr_warmup", "lumina_checkbox",
        "max_resolution", "model_list", "noise_offset_type", "optimizer", "print_only", "save_as", "save_as_bool",
        "sd3_cache_text_encoder_outputs", "sd3_cache_text_encoder_outputs_to_disk", "sd3_checkbox", "sd3_clip_l",
        "sd3_clip_l_dropout_rate", "sd3_disable_mmap_load_safetensors", "sd3_enable_scaled_pos_embed",
        "sd3_fused_backward_pass", "sd3_t5_dropout_rate", "sd3_t5xxl", "sd3_text_encoder_batch_size", "sdxl",
        "sdxl_cache_text_encoder_outputs", "sdxl_checkbox", "sdxl_no_half_vae", "t5xxl_lr", "template", "train_dir",
        "training_preset", "use_latent_files", "use_wandb",
        # LoRA_Easy_Training_Scripts, lora-scripts, notebooks
        "anima_checkbox", "enable_base_weight", "enable_block_weights", "enable_preview", "lycoris_algo",
        "lr_restart_cycles", "lokr_factor", "dylora_unit", "model_train_type", "negative_prompts",
        "network_args_custom", "optimizer_args_custom", "positive_prompts", "prodigy_d0", "prodigy_d_coef",
        "randomly_choice_prompt", "remove_mode", "sample_cfg", "sample_height", "sample_seed", "sample_steps",
        "sample_width", "save_toml", "save_toml_location", "tag_occurrence", "tag_file_location", "ui_custom_params",
        "warmup_ratio", "project_name", "optimizer_type_custom", "save_n_epochs_type", "save_n_epochs_type_value",
    ),
    NETWORK_ARGUMENT: (
        "algo", "block_alphas", "block_dims", "block_lr_zero_threshold", "block_size", "bypass_mode", "constrain",
        "conv_alpha", "conv_block_alphas", "conv_block_dims", "conv_dim", "decompose_both", "dora_wd",
        "down_lr_weight", "dropout", "enable_all_linear", "enable_conv", "exclude_patterns", "factor", "ggpo_beta",
        "ggpo_sigma", "img_attn_dim", "img_mlp_dim", "img_mod_dim", "in_dims", "include_patterns",
        "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio", "loraplus_unet_lr_ratio", "mid_lr_weight",
        "module_dropout", "rank_dropout", "rank_dropout_scale", "rescaled", "single_dim", "single_mod_dim",
        "split_qkv", "train_blocks", "train_double_block_indices", "train_norm", "train_on_input",
        "train_single_block_indices", "txt_attn_dim", "txt_mlp_dim", "txt_mod_dim", "unit",
        "up_lr_weight", "use_cp", "use_scalar", "use_tucker",
    ),
    DATASET_KEY: (
        "batch_size", "class_tokens", "custom_attributes", "image_dir", "is_reg", "metadata_file",
        "network_multiplier", "num_repeats",
    ),
    OTHER_SCRIPT: (
        # ControlNet, LLLite
        "cond_in_channels", "control_net_lllite_path",
        # HunyuanImage and Anima
        "attn_mode", "byt5", "cross_attn_lr", "fp8_vl", "llm_adapter_lr", "llm_adapter_path", "mlp_lr",
        "mod_lr", "qwen3", "qwen3_max_token_length", "qwen_image_vae_2d", "self_attn_lr", "split_attn",
        "t5_max_token_length", "t5_tokenizer_path", "text_encoder", "text_encoder_cpu",
        "unsloth_offload_checkpointing", "vae_chunk_size", "vae_disable_cache", "vae_enable_tiling",
        # newer switches that change nothing in the result
        "cuda_allow_tf32", "cuda_cudnn_benchmark",
        "svd_lowrank_niter",
        # tools for captions, metadata and images
        "caption_weights", "character_threshold", "debug_dir", "general_threshold", "max_length", "out_json",
        "recursive", "remove_underscore", "undesired_tags",
    ),
}  # fmt: skip


@cache
def foreign_kinds() -> dict[str, str]:
    """Key -> its kind."""
    return {key: kind for kind, keys in FOREIGN_KEYS.items() for key in keys}
