accelerate launch sd3_train.py \
  --pretrained_model_name_or_path={home}/sd3-models/sd3_medium.safetensors \
  --clip_l={home}/sd3-models/clip_l.safetensors --clip_g={home}/sd3-models/clip_g.safetensors \
  --t5xxl={home}/sd3-models/t5xxl.safetensors \
  --dataset_config={dataset} --output_dir={home}/output --output_name=robot_te --save_model_as=safetensors \
  --train_text_encoder --learning_rate=2e-6 --learning_rate_te1=1e-6 --learning_rate_te2=5e-7 \
  --cache_text_encoder_outputs --use_t5xxl_cache_only --cache_latents \
  --optimizer_type=AdamW --lr_scheduler=cosine --max_train_steps=2000 --mixed_precision=bf16 --gradient_checkpointing \
  --weighting_scheme=logit_normal --logit_mean=0.0 --logit_std=1.0 --training_shift=3.0
