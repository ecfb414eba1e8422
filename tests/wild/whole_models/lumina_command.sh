accelerate launch --num_cpu_threads_per_process 1 lumina_train.py \
  --pretrained_model_name_or_path={home}/lumina/lumina-image-2.safetensors \
  --gemma2={home}/lumina/gemma-2-2b.safetensors --ae={home}/lumina/ae.safetensors \
  --dataset_config={dataset} --output_dir={home}/output --output_name=robot_lumina --save_model_as=safetensors \
  --learning_rate=1e-5 --optimizer_type=AdamW8bit --lr_scheduler=constant --sdpa \
  --timestep_sampling=nextdit_shift --discrete_flow_shift=6.0 --model_prediction_type=raw \
  --system_prompt="You draw what the prompt says, carefully." \
  --max_train_epochs=10 --save_every_n_epochs=2 --mixed_precision=bf16 --full_bf16 --gradient_checkpointing \
  --cache_latents_to_disk --cache_text_encoder_outputs_to_disk
