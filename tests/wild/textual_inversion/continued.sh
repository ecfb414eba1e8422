accelerate launch train_textual_inversion.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors \
  --train_data_dir={home}/inversion --reg_data_dir={home}/train/reg --resolution=512 --train_batch_size=2 \
  --output_dir={home}/output --output_name=robot_more \
  --learning_rate=1e-3 --max_train_steps=400 --save_state --optimizer_type=AdamW --mixed_precision=fp16 \
  --token_string=robot4 --weights={home}/embeddings/robot4.pt --num_vectors_per_token=2
