accelerate launch train_textual_inversion.py \
  --pretrained_model_name_or_path={home}/sd-models/stable-diffusion-v1-5 \
  --train_data_dir={home}/train/img --resolution=512,512 --train_batch_size=4 \
  --output_dir={home}/output --output_name=object \
  --learning_rate=0.005 --lr_scheduler=constant_with_warmup --lr_warmup_steps=50 --max_train_steps=800 \
  --optimizer_type=AdamW --mixed_precision=no --seed=42 --sdpa \
  --token_string="<my-robot>" --init_word="robot" --num_vectors_per_token=1 --use_object_template
