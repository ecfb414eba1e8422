accelerate launch --num_cpu_threads_per_process 1 sd3_train_network.py \
  --pretrained_model_name_or_path={home}/sd3-models/sd3_medium_incl_clips_t5xxlfp16.safetensors \
  --dataset_config={dataset} \
  --output_dir={home}/output \
  --output_name=robot \
  --save_model_as=safetensors \
  --network_module=networks.lora_sd3 --network_dim=16 --network_alpha=16 \
  --learning_rate=1e-4 --optimizer_type="AdamW8bit" --lr_scheduler="constant" --sdpa \
  --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision="bf16" --gradient_checkpointing \
  --weighting_scheme="uniform" --t5xxl_max_token_length=256 --apply_t5_attn_mask --apply_lg_attn_mask --cache_latents
