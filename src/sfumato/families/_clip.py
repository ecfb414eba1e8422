"""CLIP's text tower: configuration, key map and encoding, shared by the families that read text with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.formats.keymap import KeyMap, Rule

TARGETS = ("encoder.layers.{n}.self_attn.{*}", "encoder.layers.{n}.mlp.{*}")
BLOCKS = ("encoder.layers.{n}",)
DROP = ("{*}embeddings.position_ids",)
FILE_KEYS = KeyMap(  # with or without the `text_model.` level; projections that other programs save along are left out
    [Rule("text_model.{*}", ("{*}",)), Rule("{*}", ("{*}",))],
    (*DROP, "text_projection{*}", "logit_scale"),
)
LENGTH = 77  # positions, start and end token included


def key_map() -> KeyMap:
    """transformers 4's `text_model.` level, which checkpoints and adapter names keep and the module lost."""
    return KeyMap([Rule("text_model.{*}", ("{*}",))], DROP)


def config_from_shapes(shapes: Mapping[str, Sequence[int]], *, activation: str = "quick_gelu") -> dict[str, Any]:
    """CLIPTextConfig from our names and shapes; every published tower has heads of 64 channels."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    layers = {key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")}
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
    }


def config_of_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """What CLIPTextConfig needs of a published config.json; the token ids there are often wrong and not used."""
    wanted = ("vocab_size", "hidden_size", "projection_dim", "intermediate_size", "num_hidden_layers")
    wanted += ("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps")
    return {name: config[name] for name in wanted if name in config}


def check_vocabulary(tokenizer: Any, encoder: Any) -> None:
    """A tokenizer of another model would give ids beyond the embedding table, or the wrong words."""
    rows = encoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) != rows:
        raise UserError(
            f"the tokenizer knows {len(tokenizer)} tokens, the text encoder {rows}",
            fix="give the folder of the checkpoint's own tokenizer with --tokenizer",
        )


def build(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    last = config["vocab_size"] - 1  # the true end token; published configurations often say 2
    return CLIPTextModel(CLIPTextConfig(**{**config, "bos_token_id": last - 1, "eos_token_id": last}))


def hidden_states(encoder: Any, ids: Tensor, *, layer: int) -> Tensor:
    """(B, 77) ids -> (B, 77, D): the output of the `layer`-th block from the end, then the final norm."""
    if layer == 1:
        return encoder(input_ids=ids).last_hidden_state
    states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
    return encoder.final_layer_norm(states[-layer])


def pooled(encoder: Any, ids: Tensor, end: int) -> Tensor:
    """(B, 77) ids -> (B, D): the final state of the first end token, found by its id and not as the highest one."""
    last = hidden_states(encoder, ids, layer=1)
    place = (ids == end).int().argmax(dim=1)
    return last[torch.arange(len(last), device=last.device), place]


def token_ids(tokenizer: Any, captions: Sequence[str], device: torch.device) -> Tensor:
    """(B, 77) ids, cut and padded as the encoder was trained with."""
    ids = tokenizer(list(captions), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return ids.input_ids.to(device)
