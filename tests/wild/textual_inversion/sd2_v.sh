accelerate launch train_textual_inversion.py --v2 --v_parameterization \
  --pretrained_model_name_or_path={home}/sd2-models/v2-1_768-ema-pruned.safetensors \
  --train_data_dir={home}/inversion --resolution=768 --enable_bucket --train_batch_size=1 \
  --output_dir={home}/output --output_name=robot_v2 \
  --learning_rate=5e-4 --max_train_steps=1000 --optimizer_type=AdamW --mixed_precision=fp16 --cache_latents \
  --token_string=robot4 --init_word=robot --num_vectors_per_token=5 --scale_v_pred_loss_like_noise_pred
