accelerate launch --mixed_precision bf16 sdxl_train_textual_inversion.py \
  --pretrained_model_name_or_path={home}/sdxl-models/sd_xl_base_1.0.safetensors \
  --train_data_dir={home}/inversion --resolution=1024 --enable_bucket --min_bucket_reso=512 --max_bucket_reso=2048 \
  --output_dir={home}/output --output_name=xl_robot \
  --learning_rate=3e-4 --max_train_steps=1000 --save_every_n_steps=250 --save_last_n_steps=500 \
  --optimizer_type=AdamW --mixed_precision=bf16 --cache_latents --gradient_checkpointing --min_snr_gamma=5 \
  --token_string=robot4 --init_word="toy robot" --num_vectors_per_token=2
