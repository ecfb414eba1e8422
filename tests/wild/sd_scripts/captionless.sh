accelerate launch --num_cpu_threads_per_process 1 train_network.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors \
  --train_data_dir={home}/train/img --caption_extension=.none-use-foldername --resolution=512 \
  --output_dir={home}/output \
  --output_name=robot \
  --save_model_as=safetensors \
  --network_module=networks.lora --max_train_steps=20 --optimizer_type=AdamW --learning_rate=1e-4 \
  --resume={home}/trained/lora-state --network_dim=2
