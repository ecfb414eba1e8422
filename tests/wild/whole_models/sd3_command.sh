accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1 sd3_train.py \
  --pretrained_model_name_or_path {home}/sd3-models/sd3_medium_incl_clips_t5xxlfp16.safetensors \
  --save_model_as safetensors --sdpa --persistent_data_loader_workers --max_data_loader_n_workers 2 \
  --seed 42 --gradient_checkpointing --mixed_precision bf16 --full_bf16 --save_precision bf16 \
  --dataset_config {dataset} --output_dir {home}/output --output_name robot_sd3 \
  --learning_rate 5e-6 --max_train_epochs 4 --save_every_n_epochs 1 --highvram \
  --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --cache_latents_to_disk \
  --optimizer_type adafactor --optimizer_args "relative_step=False" "scale_parameter=False" "warmup_init=False" \
  --lr_scheduler constant_with_warmup --max_grad_norm 0.0 --num_last_block_to_freeze 1
