"""OpenCLIP's text towers (ViT-H, ViT-bigG): from their own names to transformers', and the pooled vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sfumato.families import _clip
from sfumato.formats.keymap import KeyMap, Rule

LEVEL = "text_model."  # transformers keeps it in the class with a projection, and there alone
TARGETS = tuple(LEVEL + target for target in _clip.TARGETS)
BLOCKS = tuple(LEVEL + block for block in _clip.BLOCKS)
DROP = ("logit_scale", "attn_mask")
PROJECTED_FILE_KEYS = KeyMap([Rule("{*}", ("{*}",))], (*_clip.DROP, "logit_scale"))  # of a folder or a lone encoder


def key_map(*, projected: bool, unused: int | None = None) -> KeyMap:
    """OpenCLIP's names <-> CLIPTextModelWithProjection's, or without its projection CLIPTextModel's.

    unused: a last layer that stands in the file though the model reads the text off the layer before it.
    """
    level = LEVEL if projected else ""
    theirs, ours = "transformer.resblocks.{n}.", level + "encoder.layers.{n}."
    qkv = [f"{ours}self_attn.{name}_proj." for name in "qkv"]
    rules = [
        Rule("token_embedding", (level + "embeddings.token_embedding",)),
        Rule("positional_embedding", (level + "embeddings.position_embedding.weight",)),
        Rule("ln_final", (level + "final_layer_norm",)),
        Rule(theirs + "ln_1", (ours + "layer_norm1",)),
        Rule(theirs + "ln_2", (ours + "layer_norm2",)),
        Rule(theirs + "attn.in_proj_weight", tuple(name + "weight" for name in qkv)),
        Rule(theirs + "attn.in_proj_bias", tuple(name + "bias" for name in qkv)),
        Rule(theirs + "attn.out_proj", (ours + "self_attn.out_proj",)),
        Rule(theirs + "mlp.c_fc", (ours + "mlp.fc1",)),
        Rule(theirs + "mlp.c_proj", (ours + "mlp.fc2",)),
    ]
    if projected:
        rules.append(Rule("text_projection", ("text_projection.weight",), "transpose"))
    drop = DROP if projected else (*DROP, "text_projection")
    return KeyMap(rules, drop if unused is None else (*drop, f"transformer.resblocks.{unused}.{{*}}"))


def layer_count(keys: Sequence[str], prefix: str) -> int:
    """Layers of the tower whose keys start with `prefix`."""
    start = prefix + "transformer.resblocks."
    return len({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """CLIPTextConfig from our names and shapes, with or without the projection."""
    config = _clip.config_from_shapes({k.removeprefix(LEVEL): v for k, v in shapes.items()}, activation="gelu")
    if "text_projection.weight" in shapes:
        config["projection_dim"] = shapes["text_projection.weight"][0]
    return config


def build_projected(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip.text_config(config))


def hidden_and_pooled(encoder: Any, ids: Tensor, end: int, *, layer: int) -> tuple[Tensor, Tensor]:
    """(B, 77) ids -> the `layer`-th block's output from the end (B, 77, D), and the projected vector (B, P)."""
    hidden, last = _clip.states(encoder.text_model, ids, layer=layer)
    return hidden, encoder.text_projection(_clip.at_first_end(last, ids, end))
