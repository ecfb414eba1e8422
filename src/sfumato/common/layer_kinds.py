"""sd-scripts' names of the layers that a control image may change: `--lllite_target_layers`."""

from __future__ import annotations

QUERIES, KEYS, CROSS_QUERIES, FEED_FORWARD = "self_attn_q_pre", "self_attn_kv_pre", "cross_attn_q_pre", "mlp_fc1_pre"
LAYER_KINDS = (QUERIES, KEYS, CROSS_QUERIES, FEED_FORWARD)
KIND_PRESETS = {
    "self_attn_q": (QUERIES,),
    "self_attn_qkv": (QUERIES, KEYS),
    "self_attn_qkv_cross_q": (QUERIES, KEYS, CROSS_QUERIES),
}
DEFAULT_LAYERS = "self_attn_q"


def parse_layer_kinds(text: str) -> tuple[str, ...]:
    """The kinds that a preset or a list with commas names, in their own order. ValueError for an unknown one."""
    named = KIND_PRESETS.get(text.strip()) or tuple(part.strip() for part in text.split(",") if part.strip())
    if not named or not set(named) <= set(LAYER_KINDS):
        raise ValueError(f"names no layers; write {', '.join(KIND_PRESETS)}, or some of {', '.join(LAYER_KINDS)}")
    return tuple(kind for kind in LAYER_KINDS if kind in named)


def check_layer_kinds(text: str) -> str:
    """The text itself; ValueError where it names no layers."""
    parse_layer_kinds(text)
    return text
