accelerate launch --num_cpu_threads_per_process 1 train_network.py \
  --v2 --pretrained_model_name_or_path={home}/sd2-base/512-base-ema.ckpt \
  --dataset_config={dataset} \
  --output_dir={home}/output \
  --output_name=robot \
  --save_model_as=safetensors \
  --network_module=networks.lora --max_train_steps=20 --learning_rate=1e-4 --optimizer_type=RAdamScheduleFree \
  --vae= --network_weights ""
