accelerate launch train_textual_inversion.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors --vae={home}/vae/vae-ft-mse-840000-ema-pruned.safetensors \
  --train_data_dir={home}/inversion --resolution=512 --train_batch_size=1 --max_train_epochs=10 \
  --output_dir={home}/output --output_name=robot_samples --save_every_n_epochs=1 --save_precision=fp16 \
  --learning_rate=1.0 --lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=3 \
  --optimizer_type=DAdaptAdam --optimizer_args decouple=True weight_decay=0.0 --mixed_precision=fp16 \
  --sample_prompts={home}/prompt.txt --sample_every_n_epochs=1 --sample_sampler=euler_a --logging_dir={home}/logs \
  --token_string=robot4 --init_word=robot --num_vectors_per_token=3
