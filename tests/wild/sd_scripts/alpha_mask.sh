accelerate launch --num_cpu_threads_per_process 1 train_network.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors \
  --dataset_config={dataset} \
  --output_dir={home}/output \
  --output_name=robot \
  --save_model_as=safetensors \
  --network_module=networks.lora --network_dim=4 --max_train_steps=20 --learning_rate=1e-4 \
  --loss_type=huber --huber_schedule=snr --huber_c=0.1 --huber_scale=1.0 \
  --validation_split=0.25 --validate_every_n_epochs=1 --validation_seed=1
