"""Files of weights that no family here trains, by keys that no other model has: they are called what they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator

# What it is, and endings of keys that together only its files have; one row for each layout. The first row that fits
# counts.
_KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a ControlNet", ("controlnet_cond_embedding.conv_in.weight",)),
    ("a ControlNet", ("input_hint_block.0.weight",)),
    ("a ControlNet", ("zero_convs.0.0.weight",)),
    ("a ControlNet", ("controlnet_blocks.0.weight",)),
    ("a ControlNet", ("control_all_x_embedder.2-1.weight",)),
    ("a T2I-Adapter", ("body.0.resnets.0.block1.weight",)),
    ("a T2I-Adapter", ("body.0.block1.weight",)),
    ("an IP-Adapter", ("to_k_ip.weight",)),
    ("motion modules of AnimateDiff", ("motion_modules.0.temporal_transformer.norm.weight",)),
    ("motion modules of AnimateDiff", ("motion_modules.0.transformer_blocks.0.attn1.to_q.weight",)),
    ("an upscaler (ESRGAN)", ("model.1.sub.0.RDB1.conv1.0.weight",)),
    ("an upscaler (ESRGAN)", ("RRDB_trunk.0.RDB1.conv1.weight",)),
    ("an upscaler (ESRGAN)", ("body.0.rdb1.conv1.weight",)),
    ("an upscaler (SwinIR)", ("layers.0.residual_group.blocks.0.attn.qkv.weight",)),
    ("a model in four bits (bitsandbytes)", ("quant_state.bitsandbytes__nf4",)),
    ("a model in four bits (bitsandbytes)", ("quant_state.bitsandbytes__fp4",)),
    ("a model in four bits (Nunchaku)", ("wscales", "qweight")),
    ("the refiner of Stable Diffusion XL", ("embedders.0.model.transformer.resblocks.0.attn.in_proj_weight",)),
    ("Stable unCLIP", ("noise_augmentor.data_mean",)),
    ("Stable Video Diffusion", ("input_blocks.1.0.time_stack.in_layers.0.weight",)),
    ("Stable Video Diffusion", ("down_blocks.0.resnets.0.temporal_res_block.conv1.weight",)),
    ("Stable Cascade", ("clip_txt_mapper.weight",)),
    ("Stable Cascade", ("clip_txt_pooled_mapper.weight",)),
    ("Stable Cascade", ("effnet_mapper.0.weight",)),
    ("Kolors", ("encoder_hid_proj.weight",)),
    ("FLUX.1 Redux", ("redux_up.weight", "redux_down.weight")),
    ("FLUX.2", ("single_stream_modulation.lin.weight",)),
    ("FLUX.2", ("single_stream_modulation.linear.weight",)),
    ("Chroma Radiance", ("nerf_blocks.0.param_generator.weight",)),
    ("Chroma Radiance", ("img_in_patch.weight",)),
    ("Z-Image", ("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight")),
    ("Lumina-Next", ("layers.0.attention.wq.weight", "cap_embedder.0.weight")),
    ("HiDream", ("double_stream_blocks.0.block.adaLN_modulation.1.bias",)),
    ("Qwen-Image", ("transformer_blocks.0.img_mod.1.weight",)),
    ("Wan", ("head.modulation",)),
    ("Wan", ("condition_embedder.time_embedder.linear_1.weight",)),
    ("HunyuanVideo or HunyuanImage", ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",)),
    ("HunyuanVideo or HunyuanImage", ("context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight",)),
    ("Hunyuan-DiT", ("text_embedding_padding", "mlp_t5.0.weight")),
    ("LTX-Video", ("patchify_proj.weight",)),
    ("Sana", ("attention_y_norm.weight",)),
    ("Sana", ("caption_norm.weight", "patch_embed.proj.weight")),
    ("PixArt", ("y_embedder.y_proj.fc1.weight", "t_block.1.weight")),
    ("PixArt", ("adaln_single.linear.weight", "pos_embed.proj.weight")),
    ("Mochi", ("blocks.0.attn.qkv_x.weight",)),
    ("AuraFlow", ("double_layers.0.attn.w1q.weight",)),
    ("AuraFlow", ("joint_transformer_blocks.0.attn.add_q_proj.weight", "register_tokens")),
    ("CogVideoX", ("patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight")),
    ("Anima", ("llm_adapter.blocks.0.cross_attn.q_proj.weight",)),
    ("Cosmos", ("net.x_embedder.proj.1.weight",)),
    ("an autoencoder of videos (Wan, Qwen-Image)", ("decoder.middle.0.residual.0.gamma",)),
    ("an autoencoder of videos (Wan, Qwen-Image)", ("decoder.mid_block.attentions.0.norm.gamma",)),
    ("a small autoencoder for previews (TAESD)", ("encoder.layers.0.weight", "decoder.layers.0.weight")),
)
_EMBEDDING_KEYS = ({"emb_params"}, {"clip_l", "clip_g"})
_LARGEST_EMBEDDING = 4  # tensors


def name_other_model(keys: Collection[str]) -> str:
    """What a file with these keys is, with an article where it has one; empty where it is none of these."""
    if len(keys) <= _LARGEST_EMBEDDING and any(names <= set(keys) for names in _EMBEDDING_KEYS):
        return "an embedding of textual inversion"
    endings = {ending for key in keys for ending in _list_endings(key)}
    return next((what for what, wanted in _KEYS if endings.issuperset(wanted)), "")


def _list_endings(key: str) -> Iterator[str]:
    """a.b.c, b.c and c."""
    while key:
        yield key
        key = key.partition(".")[2]
