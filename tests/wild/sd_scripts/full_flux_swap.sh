accelerate launch --num_cpu_threads_per_process 1 flux_train.py \
  --pretrained_model_name_or_path {home}/models/unet/flux1-dev.sft \
  --clip_l {home}/models/clip/clip_l.safetensors --t5xxl {home}/models/clip/t5xxl_fp16.safetensors --ae {home}/models/vae/ae.sft \
  --dataset_config {dataset} --output_dir {home}/output --output_name robot \
  --learning_rate 5e-5 --max_train_epochs 4 --cache_latents --cache_text_encoder_outputs --full_bf16 --mixed_precision bf16 --gradient_checkpointing \
  --optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False --lr_scheduler constant \
  --blockwise_fused_optimizers --blocks_to_swap 8
