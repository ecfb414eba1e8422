accelerate launch --num_cpu_threads_per_process 1 sdxl_train_control_net_lllite.py \
  --pretrained_model_name_or_path="{home}/sdxl-models/sd_xl_base_1.0.safetensors" --train_data_dir="{home}/paired" \
  --conditioning_data_dir="{home}/datasets/controls" --caption_extension=".txt" --resolution="1024,1024" \
  --output_dir="{home}/output" --output_name="robot_depth" --save_model_as="safetensors" --save_precision="fp16" \
  --mixed_precision="fp16" --no_half_vae --network_dim=32 --cond_emb_dim=16 --network_dropout=0.1 \
  --learning_rate=1e-4 --optimizer_type="AdaFactor" \
  --optimizer_args "scale_parameter=False" "relative_step=False" "warmup_init=False" \
  --lr_scheduler="constant_with_warmup" --lr_warmup_steps=100 --max_grad_norm=0.0 --max_train_steps=2000
