accelerate launch lumina_train.py \
  --pretrained_model_name_or_path={home}/lumina/lumina-image-2.safetensors \
  --gemma2={home}/lumina/gemma-2-2b.safetensors --ae={home}/lumina/ae.safetensors \
  --train_data_dir={home}/train/img --caption_extension=.txt --resolution=512 --enable_bucket \
  --conditioning_data_dir={home}/datasets/masks --masked_loss \
  --output_dir={home}/output --output_name=lumina_masked \
  --learning_rate=1e-5 --optimizer_type=Lion --max_train_steps=600 --save_every_n_steps=200 --mixed_precision=bf16 \
  --loss_type=huber --huber_schedule=exponential --huber_c=0.1 --gemma2_max_token_length=128
