accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py \
  --pretrained_model_name_or_path={home}/sdxl-models/sd_xl_base_1.0.safetensors --dataset_config={dataset} \
  --output_dir={home}/output \
  --output_name=robot \
  --save_model_as=safetensors \
  --network_module=networks.lora --max_train_steps=20 --learning_rate=1e-4 --mixed_precision=bf16 \
  --torch_compile --dynamo_backend=inductor --fp8_base_unet
