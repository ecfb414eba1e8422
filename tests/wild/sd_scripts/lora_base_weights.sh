accelerate launch --num_cpu_threads_per_process 1 train_network.py \
  --pretrained_model_name_or_path={home}/sd-models/model.safetensors \
  --dataset_config={dataset} \
  --output_dir={home}/output \
  --output_name=robot \
  --save_model_as=safetensors \
  --base_weights {home}/lora/robot-000001.safetensors --base_weights_multiplier 0.5 \
  --network_module=networks.lora --network_dim=4 --network_alpha=2 --network_train_text_encoder_only \
  --max_train_steps=100 --learning_rate=5e-5 --lr_scheduler=warmup_stable_decay --lr_warmup_steps=10 --lr_decay_steps=0.2 \
  --optimizer_type=AdamWScheduleFree --mixed_precision=no
