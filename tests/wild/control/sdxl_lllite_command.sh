accelerate launch --mixed_precision bf16 sdxl_train_control_net_lllite.py \
  --pretrained_model_name_or_path {home}/sdxl-models/sd_xl_base_1.0.safetensors --dataset_config {dataset} \
  --output_dir {home}/output --output_name robot_edges --save_model_as safetensors --mixed_precision bf16 \
  --network_dim 64 --cond_emb_dim 32 --learning_rate 2e-4 --optimizer_type AdamW8bit --max_train_epochs 5 \
  --cache_latents --cache_latents_to_disk --cache_text_encoder_outputs --gradient_checkpointing --seed 1234 \
  --save_every_n_epochs 1 --xformers
