"""Help for tests of key maps: real models without storage, and small tensors that no two places share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from sfumato.formats.keymap import KeyMap

UNETS: dict[str, dict[str, Any]] = {  # published configurations, by the goldens' names
    "sd15": {
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
}
UNETS["sd21_linearproj"] = UNETS["sd15"] | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
UNETS["sd21"] = UNETS["sd21_linearproj"] | {"use_linear_projection": False}
UNETS["sdxl"] = {
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "projection_dim": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
CLIP_H = CLIP_L | {  # as Stable Diffusion 2 uses it, without its last layer
    "hidden_size": 1024,
    "projection_dim": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
CLIP_G = CLIP_H | {
    "hidden_size": 1280,
    "projection_dim": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}

SD3: dict[str, dict[str, Any]] = {  # published transformers, by sd-scripts' names
    "medium": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "dual_attention_layers": [],
        "qk_norm": None,
    },
}
SD3["5-medium"] = SD3["medium"] | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
SD3["5-large"] = SD3["medium"] | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}


LUMINA: dict[str, Any] = {
    "in_channels": 16,
    "hidden_size": 2304,
    "num_layers": 26,
    "num_refiner_layers": 2,
    "num_attention_heads": 24,
    "num_kv_heads": 8,
    "cap_feat_dim": 2304,
    "axes_dim_rope": [32, 32, 32],
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
}
GEMMA2: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with init_empty_weights():
        return build()


def tagged(module: nn.Module, columns: int | None = None) -> dict[str, Tensor]:
    """The module's keys with small tensors that no two places share; rows are kept where stacking matters."""
    state: dict[str, Tensor] = {}
    start = 0
    for name, tensor in module.state_dict().items():
        rows = tensor.shape[0] if columns is not None else 1
        state[name] = torch.arange(start, start + rows).reshape(rows, *[1] * (tensor.ndim - 1))
        start += rows
    return state


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def round_trip(key_map: KeyMap, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in original names, which lead back to the very same state."""
    original = key_map.to_original(state)
    same(to_ours(key_map, original, {name: tensor.shape for name, tensor in state.items()}), state)
    return original


def to_ours(key_map: KeyMap, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A state dict in our names; keys that are dropped on purpose are ignored."""
    ours: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not key_map.is_dropped(key):
            ours |= dict(key_map.split(key, tensor, shapes))
    return ours


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
