accelerate launch train_textual_inversion.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors \
  --dataset_config={dataset} \
  --output_dir={home}/output --output_name=style --save_model_as=pt \
  --learning_rate=5e-3 --max_train_epochs=10 --save_every_n_epochs=5 \
  --optimizer_type=Lion --mixed_precision=bf16 --gradient_checkpointing --clip_skip=2 \
  --token_string=zstyle --init_word=painting --num_vectors_per_token=8 --use_style_template
