accelerate launch train_textual_inversion.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors --dataset_config={dataset} \
  --output_dir={home}/output --output_name=masked --save_model_as=safetensors \
  --learning_rate=5e-3 --max_train_steps=500 --optimizer_type=AdamW --mixed_precision=fp16 --cache_latents --masked_loss \
  --loss_type=huber --huber_schedule=snr --noise_offset=0.05 \
  --token_string=robot4 --init_word=robot
