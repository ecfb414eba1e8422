accelerate launch -m sdxl_train_control_net_lllite.py --lllite_version=2 --lllite_target_layers=self_attn_qkv_cross_q \
  --pretrained_model_name_or_path={home}/sdxl-models/sd_xl_base_1.0.safetensors --dataset_config={dataset} \
  --output_dir={home}/output --output_name=robot_pose --save_model_as=safetensors \
  --cond_emb_dim=32 --lllite_mlp_dim=64 --lllite_cond_dim=64 --lllite_cond_resblocks=2 --lllite_use_aspp \
  --learning_rate=5e-5 --optimizer_type=AdamW8bit --lr_scheduler=constant --max_train_epochs=10 \
  --mixed_precision=bf16 --gradient_checkpointing --cache_latents --cache_text_encoder_outputs
