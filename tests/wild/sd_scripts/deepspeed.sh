accelerate launch --num_cpu_threads_per_process 1 train_network.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors --dataset_config={dataset} \
  --output_dir={home}/output \
  --output_name=robot \
  --save_model_as=safetensors \
  --network_module=networks.lora --max_train_steps=20 --learning_rate=1e-4 --mixed_precision=fp16 \
  --deepspeed --zero_stage=2 --offload_optimizer_device=cpu
