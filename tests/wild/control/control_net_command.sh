accelerate launch train_control_net.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors --dataset_config={dataset} \
  --output_dir={home}/output --output_name=robot_canny --save_model_as=safetensors --learning_rate=1e-5 \
  --max_train_steps=10000 --save_every_n_steps=1000 --optimizer_type=AdamW8bit --mixed_precision=fp16 --cache_latents \
  --sample_every_n_steps=500 --sample_prompts={home}/control_prompt.txt --gradient_accumulation_steps=4
