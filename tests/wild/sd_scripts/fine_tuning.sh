accelerate launch --num_cpu_threads_per_process 1 fine_tune.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors \
  --dataset_config={dataset} \
  --output_dir={home}/output \
  --output_name=robot \
  --save_model_as=safetensors \
  --learning_rate=5e-6 --max_train_steps=10000 \
  --use_8bit_adam --xformers --gradient_checkpointing \
  --mixed_precision=bf16
